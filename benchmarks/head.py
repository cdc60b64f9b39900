"""The language-model head at LLaDA's vocabulary: logits of all tokens, of the masked ones, and of these in pieces.

Forward and backward of one micro-batch, with the loss's weights, over the share of masked tokens. Each measurement is a
fresh process, whose memory is what it holds at most beyond its inputs. The losses and gradients have to be the same.

    python benchmarks/head.py                # table, picture, and benchmarks/results/head_DATE.*
    python benchmarks/head.py --device cuda --hidden 4096 --tokens 16384 --precision bf16
    python benchmarks/head.py --no-write
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

from common import ROOT, machine_and_versions

VOCABULARY = 126_464
SIDES = {"all tokens": None, "masked": 1 << 40, "masked, in pieces": 1 << 28}  # logits that are held at once
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the head over the share of masked tokens.")
    parser.add_argument("--tokens", type=int, default=4096, help="of the micro-batch")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "SHARE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments, arguments.worker[0], float(arguments.worker[1]))))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for share in SHARES:
        for side in SIDES:
            found[side].append(one := run_worker(side, share))
            print(f"{share:4.0%} masked, {side}: {one['seconds']:.2f} s, {one['mib']:,.0f} MiB", flush=True)
        for side in SIDES:
            if (problem := different(found["all tokens"][-1], found[side][-1], arguments.precision)) is not None:
                sys.exit(problem)
    report = table(found)
    print(report)
    if not arguments.no_write:
        path = ROOT / f"benchmarks/results/head_{date.today().isoformat()}.md"
        path.write_text(f"{header(arguments)}\n{report}\n\n![over the share of masked tokens]({path.stem}.png)\n")
        draw(found, path.with_suffix(".png"), arguments.device)
        print(f"wrote {path.relative_to(ROOT)} and .png")


def run_worker(side: str, share: float) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side, str(share)]
    told: dict[str, float] = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]
    )
    return told


def measure(arguments: argparse.Namespace, side: str, share: float) -> dict[str, float]:
    """Median seconds of forward and backward; MiB beyond the inputs; the loss, and norms of the gradients."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    backend = "nccl" if arguments.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    device = torch.device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    step = prepared(side, share, arguments.tokens, arguments.hidden, VOCABULARY, dtype, device)
    seconds, peak = [], Peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # other programs slow a CPU's clock time
    for _ in range(1 + arguments.rounds):
        with peak:
            started = clock()
            step(norms=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
    return {"seconds": statistics.median(seconds[1:]), "mib": peak.mib, **step()}


def prepared(
    side: str, share: float, tokens: int, hidden_size: int, vocabulary: int, dtype: Any, device: Any
) -> Callable[..., dict[str, float]]:
    """A forward and backward pass of one side, which tells the loss and norms of the gradients unless norms=False.

    Random hidden states and weights, the same for each side; megatron-core's groups have to be there.
    """
    import torch

    from llada_train.model import head

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.empty(vocabulary, hidden_size, device=device, dtype=dtype).normal_(0, 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    masked = torch.rand(tokens, device=device).argsort() < share * tokens
    weights, at = masked / (share * tokens), masked.nonzero().squeeze(1)

    def step(norms: bool = True) -> dict[str, float]:
        hidden.grad = weight.grad = None
        if (held := SIDES[side]) is None:
            nll = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
            loss = (nll * weights).sum()
        else:
            with mock.patch.object(head, "CHUNK", held):
                told = head._LogNormaliserAndTarget.apply(hidden[at], weight, targets[at])
                loss = ((told[0] - told[1]) * weights[at]).sum()
        loss.backward()
        if not norms:
            return {}
        gradients = {"to_hidden": hidden.grad, "to_weight": weight.grad}
        return {"loss": float(loss)} | {name: float(g.float().norm()) for name, g in gradients.items() if g is not None}

    return step


class Peak:
    """MiB at most, beyond what there is when it begins. A context manager."""

    def __init__(self, device: Any) -> None:
        self.mib, self._cuda = 0.0, device.type == "cuda"

    def __enter__(self) -> None:
        self._over = threading.Event()
        self._before = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.mib = max(self.mib, self._now() - self._before)

    def _now(self) -> float:
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated() / 2**20 if self.mib else torch.cuda.memory_allocated() / 2**20
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * 4096 / 2**20


def different(one: dict[str, float], other: dict[str, float], precision: str) -> str | None:
    """What differs between the logits of all tokens and another side, if anything."""
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for name in ("loss", "to_hidden", "to_weight"):
        if abs(one[name] - other[name]) > tolerance * abs(one[name]):
            return f"{name}: {one[name]} with the logits of all tokens, {other[name]} otherwise"
    return None


def header(arguments: argparse.Namespace) -> str:
    settings = f"--tokens {arguments.tokens} --hidden {arguments.hidden} --precision {arguments.precision}"
    return f"""# The head over the share of masked tokens, {date.today().isoformat()}

{machine_and_versions()}
- {arguments.tokens:,} tokens, hidden size {arguments.hidden}, vocabulary {VOCABULARY:,}, {arguments.precision}
- `python benchmarks/head.py --device {arguments.device} {settings}`

Forward and backward, seconds of a GPU or CPU seconds; memory beyond hidden states and weights. In pieces: 1 GiB of
fp32 logits at once, made again in backward. Losses and gradients are the same to 1e-5 (bf16: 2e-2).
"""


def table(found: dict[str, list[dict[str, float]]]) -> str:
    sides = " | ".join(f"{side}, s | MiB" for side in found)
    lines = [f"| masked | {sides} |", "|---" * (1 + 2 * len(found)) + "|"]
    for i, share in enumerate(SHARES):
        cells = [f"{one[i]['seconds']:.2f} | {one[i]['mib']:,.0f}" for one in found.values()]
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, float]]], path: Path, device: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(
        axes, ("seconds", "mib"), ("CPU seconds" if device == "cpu" else "seconds", "MiB"), strict=True
    ):
        for side, values in found.items():
            axis.plot([100 * share for share in SHARES], [one[key] for one in values], marker="o", label=side)
        axis.set(xlabel="% of tokens masked", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
