"""Speed and memory of the engine against a plain PyTorch loop: same model, weights, micro-batches and optimizer.

Each measurement is a fresh process; the two sides alternate, so that a machine that slows down slows both. Their losses
are compared as well: two sides that do the same work lose the same.

    python benchmarks/engine_vs_plain.py                    # table, and benchmarks/results/engine_vs_plain_DATE.md
    python benchmarks/engine_vs_plain.py --steps 4 --rounds 1 --no-write
"""

import argparse
import itertools
import json
import math
import os
import resource
import shutil
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

from llada_train.config.load import load_config
from llada_train.config.schema import Config

CONFIG = ROOT / "configs/pretrain/demo.yaml"
# The engine with torch's kernels and with compiled ones, where there is a compiler.
SIDES = ("engine", *(("engine, compiled",) if shutil.which("g++") else ()), "plain")
PRECISIONS = ("fp32", "bf16")
WARMUP_STEPS = 2
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative, at every step

TrainStep = Callable[[list[Any]], float]
"""One optimizer step on the micro-batches of a global batch; returns the loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the engine against a plain PyTorch loop.")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side and precision")
    parser.add_argument("--vocabulary", type=int, help="ids of the model, in place of the demo's: LLaDA has 126464")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "PRECISION", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, precision, data = arguments.worker
        print(json.dumps(measure(side, _config(precision, Path(data), arguments.vocabulary, side), arguments.steps)))
        return
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in itertools.product(PRECISIONS, SIDES)}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for _, (precision, side) in itertools.product(range(arguments.rounds), runs):
            runs[precision, side].append(_run_worker(side, precision, folder, arguments))
            print(f"{precision} {side}: {_median(runs[precision, side][-1:], 'wall'):.3f} s per step", flush=True)
    for precision in PRECISIONS:
        for side in SIDES[:-1]:
            _check_same_losses(precision, runs[precision, side][0]["losses"], runs[precision, "plain"][0]["losses"])
    config = _config("fp32", ROOT, arguments.vocabulary)
    report = table(runs, config)
    print(report)
    if not arguments.no_write:
        vocabulary = f"_{arguments.vocabulary}" if arguments.vocabulary else ""
        path = ROOT / f"benchmarks/results/engine_vs_plain{vocabulary}_{date.today().isoformat()}.md"
        path.write_text(f"{_header(arguments, config)}\n{report}\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def measure(side: str, config: Config, steps: int) -> dict[str, Any]:
    """Seconds of each timed step, by the clock and of CPU time; the loss of each step; peak memory (MiB)."""
    from llada_train.data.loader import TrainingLoader
    from llada_train.data.rows import PretrainingData

    size = config.training.global_batch_size
    loader = TrainingLoader(PretrainingData(config), config)
    batches = [loader.global_batch(i * size) for i in range(WARMUP_STEPS + steps)]
    train_step = (plain_step if side == "plain" else engine_step)(config)
    wall_seconds, cpu_seconds, losses = [], [], []
    for global_batch in batches:
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(train_step(global_batch))
        wall_seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    return {
        "wall": wall_seconds[WARMUP_STEPS:],
        "cpu": cpu_seconds[WARMUP_STEPS:],
        "losses": losses,
        "peak_mib": _peak_mib(),
    }


def engine_step(config: Config) -> TrainStep:
    from llada_train.parallel import topology

    topology.quiet_engines()
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel.engine import Engine

    engine = Engine(config, topology.initialize(config.parallel))
    initial = InitialWeights(config.model, config.seed)
    engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    return lambda batches: engine.train_step(batches, LEARNING_RATE)[0].loss


def plain_step(config: Config, weights: Any = None) -> TrainStep:
    """The loop that one would write: forward, cross-entropy where masked, AdamW. bf16 is autocast over fp32 weights.

    `weights`: initial ones, on the device that is to train; None: the engine's.
    """
    import torch
    from torch.nn import functional as F

    from llada_train.convert.plain import plain_model
    from llada_train.model.weights import InitialWeights

    model = plain_model(weights or InitialWeights(config.model, config.seed), config.model).train()
    device = model.device
    settings = config.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=LEARNING_RATE,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step(batches: list[Any]) -> float:
        total = 0.0
        for batch in (batch.to(device) for batch in batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
                logits = model(batch.input_ids).logits
            masked = logits.flatten(0, 1)[batch.masked_positions].float()
            loss = (batch.loss_weight * F.cross_entropy(masked, batch.targets, reduction="none")).sum()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def table(runs: dict[tuple[str, str], list[dict[str, Any]]], config: Config) -> str:
    """A Markdown table: medians over the processes of each side, and the engine's ratio to the plain loop."""
    tokens = config.training.global_batch_size * config.data.sequence_length
    lines = [
        "| precision | side | s per step | CPU s per step | CPU ÷ plain | tokens/s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (precision, side), measured in runs.items():
        wall, cpu = _median(measured, "wall"), _median(measured, "cpu")
        ratio = cpu / _median(runs[precision, "plain"], "cpu")
        peak = statistics.median(one["peak_mib"] for one in measured)
        spread = f"{_median_of(measured, 'wall', min):.3f}–{_median_of(measured, 'wall', max):.3f}"
        lines.append(
            f"| {precision} | {side} | {wall:.3f} ({spread}) | {cpu:.3f} | {ratio:.2f} | {tokens / wall:,.0f} "
            f"| {peak:,.0f} |"
        )
    return "\n".join(lines)


def _config(precision: str, data: Path, vocabulary: int | None, side: str = "engine") -> Config:
    return load_config(
        CONFIG,
        [
            f"data.tokenizer={data / 'tokenizer'}",
            f"data.corpora=[{{path: {data / 'corpus'}}}]",
            "objective.random_length_probability=0",  # the plain loop knows no padding
            f"training.precision={precision}",
            f"training.kernels={'compile' if side == 'engine, compiled' else 'torch'}",
            *([f"model.vocab_size={vocabulary}"] if vocabulary is not None else []),
        ],
        world_size=1,
    )


def _run_worker(side: str, precision: str, data: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--steps", str(arguments.steps), "--worker", side, precision, data]
    command += [] if arguments.vocabulary is None else ["--vocabulary", str(arguments.vocabulary)]
    # One thread, so that CPU time is work and not waiting.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _check_same_losses(precision: str, engine: list[float], plain: list[float]) -> None:
    for step, (ours, theirs) in enumerate(zip(engine, plain, strict=True)):
        if not math.isclose(ours, theirs, rel_tol=LOSS_TOLERANCE[precision]):
            sys.exit(f"{precision}: not the same work: loss {ours} and {theirs} at step {step}")


def _median(measured: list[dict[str, Any]], clock: str) -> float:
    return statistics.median(second for one in measured for second in one[clock])


def _median_of(measured: list[dict[str, Any]], clock: str, pick: Callable[[list[float]], float]) -> float:
    """The smallest or largest of the processes' own medians."""
    return pick([_median([one], clock) for one in measured])


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _header(arguments: argparse.Namespace, config: Config) -> str:
    from llada_train.model.sizes import parameter_count

    steps, rounds = arguments.steps, arguments.rounds
    vocabulary = f" --vocabulary {arguments.vocabulary}" if arguments.vocabulary else ""
    model, training = config.model, config.training
    return f"""# The engine against a plain PyTorch loop, {date.today().isoformat()}

One process of one thread. {CONFIG.relative_to(ROOT)}: {model.num_layers} layers, hidden size {model.hidden_size},
{parameter_count(model):,} parameters, vocabulary {model.vocab_size:,}, rows of {config.data.sequence_length} tokens,
{training.global_batch_size} rows per step in micro-batches of {training.micro_batch_size}, no cut rows.
Both sides start from the same weights, read the same micro-batches, and lost the same at every step.
The plain loop computes logits at every position; its bf16 is autocast over fp32 weights.
{steps} timed steps after {WARMUP_STEPS} others in each of {rounds} processes per row of the table, sides alternating.
Compiled: `training.kernels=compile`; else torch's kernels.
CPU time leaves out what other processes of the machine took. Memory is the process's peak, imports included.

{machine_and_versions()}
- `python benchmarks/engine_vs_plain.py --steps {steps} --rounds {rounds}{vocabulary}`
"""


if __name__ == "__main__":
    main()
