"""How long a save stops training, and time and memory of saving and loading, against torch.distributed.checkpoint.

Each measurement is a fresh set of gloo processes; the sides alternate. All save the same fragments of the same model's
masters and Adam moments: our writer in the background, our writer waited for, and torch's DCP with one flat tensor per
fragment and rank.

    python benchmarks/checkpoints.py                    # table, and benchmarks/results/checkpoints_DATE.md
    python benchmarks/checkpoints.py --rounds 1 --no-write
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from common import ROOT, machine_and_versions, make_data

SIDES = ("asynchronous", "synchronous", "torch DCP")
PROCESSES = (1, 2)
MODEL = {"num_layers": 6, "hidden_size": 384, "num_heads": 6, "num_kv_heads": 6, "ffn_hidden_size": 1024}
SAVES = 3  # of each process; the first makes the buffers and is left out

Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoints: the stall, and time and memory against torch's DCP.")
    parser.add_argument("--rounds", type=int, default=3, help="sets of processes of each side")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker[0], Path(arguments.worker[1]))
        return
    runs: dict[tuple[int, str], list[Measured]] = {key: [] for key in itertools.product(PROCESSES, SIDES)}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for _, (processes, side) in itertools.product(range(arguments.rounds), runs):
            runs[processes, side].append(_run_workers(processes, side, Path(folder)))
            print(f"{processes} processes, {side}: {runs[processes, side][-1]['stall']:.3f} s stall", flush=True)
    report = table(runs)
    print(report)
    if not arguments.no_write:
        path = ROOT / f"benchmarks/results/checkpoints_{date.today().isoformat()}.md"
        path.write_text(f"{_header(arguments.rounds)}\n{report}\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def measure(side: str, folder: Path) -> None:
    """One process: seconds that a save stops training, seconds until it is a checkpoint, seconds of a load; MiB."""
    from llada_train.parallel import topology

    topology.quiet_engines()
    import torch.distributed as dist

    from llada_train.config.load import load_config
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel.engine import Engine

    config = load_config(
        ROOT / "configs/pretrain/demo.yaml",
        [
            f"data.tokenizer={folder / 'tokenizer'}",
            f"data.corpora=[{{path: {folder / 'corpus'}}}]",
            "training.precision=fp32",
            "checkpoint.keep=1",
            *(f"model.{key}={value}" for key, value in MODEL.items()),
        ],
        world_size=topology.world_size(),
    )
    engine = Engine(config, topology.initialize(config.parallel))
    initial = InitialWeights(config.model, config.seed)
    engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    save, load = (torch_side if side == "torch DCP" else our_side)(engine, folder / "out", side == "asynchronous")
    state = sum(tensor.nbytes for fragment in engine.fragments() for tensor in fragment.state.values())
    found: dict[str, list[float]] = {"stall": [], "save": []}
    peak = _peak_of(lambda: save(0, found))
    for step in range(1, SAVES):
        save(step, found)
    dist.barrier()
    started = time.perf_counter()
    load_peak = _peak_of(load)
    seconds = time.perf_counter() - started
    report = {name: statistics.median(values[1:]) for name, values in found.items()}
    report |= {"load": seconds, "state_mib": state / 2**20, "save_mib": peak, "load_mib": load_peak}
    if dist.get_rank() == 0:
        print(json.dumps(report), flush=True)
    topology.shutdown()


def our_side(engine: Any, root: Path, asynchronous: bool) -> tuple[Callable[..., None], Callable[[], None]]:
    from llada_train.checkpoint.manifest import Progress
    from llada_train.checkpoint.restore import load_newest
    from llada_train.checkpoint.writer import CheckpointWriter

    writer = CheckpointWriter(root, engine)

    def save(step: int, found: dict[str, list[float]]) -> None:
        started = time.perf_counter()
        writer.start(Progress(step=step, consumed_samples=step))
        if asynchronous:
            found["stall"].append(time.perf_counter() - started)
        writer.finish()
        found["save"].append(time.perf_counter() - started)
        if not asynchronous:
            found["stall"].append(time.perf_counter() - started)

    def load() -> None:
        assert load_newest(root, engine) is not None

    return save, load


def torch_side(engine: Any, root: Path, _: bool) -> tuple[Callable[..., None], Callable[[], None]]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    rank = dist.get_rank()
    tensors = {f"{rank}/{kind}/{f.shard.name}": t for f in engine.fragments() for kind, t in f.state.items()}

    def save(step: int, found: dict[str, list[float]]) -> None:
        started = time.perf_counter()
        dcp.save(tensors, checkpoint_id=root / f"step-{step}")
        found["stall"].append(time.perf_counter() - started)
        found["save"].append(time.perf_counter() - started)

    return save, lambda: dcp.load(tensors, checkpoint_id=root / f"step-{SAVES - 1}")


def table(runs: dict[tuple[int, str], list[Measured]]) -> str:
    """A Markdown table of medians; memory is the peak of rank 0 above what it had before."""
    lines = [
        "| processes | side | state per rank, MiB | stall, s | save, s | load, s | save: extra MiB | load: extra MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (processes, side), measured in runs.items():
        middle = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        lines.append(
            f"| {processes} | {side} | {middle['state_mib']:,.0f} | {middle['stall']:.3f} | {middle['save']:.3f} "
            f"| {middle['load']:.3f} | {middle['save_mib']:,.0f} | {middle['load_mib']:,.0f} |"
        )
    return "\n".join(lines)


def _run_workers(processes: int, side: str, data: Path) -> Measured:
    with tempfile.TemporaryDirectory(dir=data) as folder:
        for name in ("tokenizer", "corpus.bin", "corpus.idx", "corpus.json"):
            (Path(folder) / name).symlink_to(data / name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--worker", side, folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def _peak_of(work: Callable[[], None]) -> float:
    """MiB by which the process's resident memory rises meanwhile, at its highest."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not on Linux: the peak since the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _header(rounds: int) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in MODEL.items())
    return f"""# Saving and loading checkpoints, {date.today().isoformat()}

gloo processes on one machine, ZeRO 1, fp32; the demo's model with {sizes}. A save writes the fp32 masters and both Adam
moments of the rank. The stall is what training waits for: asynchronous, the copy to host memory; else all of the save.
Both sync files to the disk; ours hashes them as well, reads them back, and compares all checksums before it loads.
Medians of {SAVES - 1} saves in each of {rounds} sets of processes, sides alternating; memory is rank 0's peak above
what it had before, in its first save.

{machine_and_versions()}
- `python benchmarks/checkpoints.py --rounds {rounds}`
"""


if __name__ == "__main__":
    main()
