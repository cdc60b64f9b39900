"""Bytes, seconds and CPU time of a training step in many layouts, against one process and against arithmetic.

Each layout is a fresh set of processes of one thread. Every live tensor of the engine is counted by what it is for, and
compared with what (model, layout) alone predict. All layouts must lose the same as one process at every step.

    python benchmarks/layouts.py                    # tables, and benchmarks/results/layouts_DATE.md and .png
    python benchmarks/layouts.py --layouts tp2,pp2 --steps 2 --no-write
"""

import argparse
import gc
import itertools
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, machine_and_versions, make_data

from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.model.sizes import parameter_count
from llada_train.parallel.launch import launch_local
from llada_train.plan.layout import Layout
from llada_train.plan.memory import state

if TYPE_CHECKING:
    from torch import Tensor

    from llada_train.parallel.engine import Engine

CONFIG = ROOT / "configs/pretrain/demo.yaml"
WARMUP_STEPS = 1
LEARNING_RATE = 1e-3
QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "6"}
LOSS_TOLERANCE = 1e-2  # relative, at every step
MIB = 2**20
CAUSES = ("weights", "optimizer", "gradients")
MODEL = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "ffn_hidden_size": 1408,
    "vocab_size": 8192,
    "max_sequence_length": 256,
}
# Where DeepSpeed's three wrappers keep gradients: bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py.
GRADIENT_BUFFERS = (
    "fp32_groups_gradients_flat",
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
)
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 8, 1

ZERO2, ZERO3 = "parallel.zero_stage=2", "parallel.zero_stage=3"
TP2, TP4, SP = "parallel.tensor_parallel=2", "parallel.tensor_parallel=4", "parallel.sequence_parallel=true"
PP2, PP4 = "parallel.pipeline_parallel=2", "parallel.pipeline_parallel=4"
REFERENCE = "one"
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # name: processes, settings
    REFERENCE: (1, []),
    "one-selective": (1, ["training.recompute=selective"]),
    "one-full": (1, ["training.recompute=full"]),
    "dp2-zero1": (2, []),
    "dp2-zero2": (2, [ZERO2]),
    "dp2-zero3": (2, [ZERO3]),
    "tp2": (2, [TP2]),
    "tp2-sp": (2, [TP2, SP]),
    "pp2": (2, [PP2]),
    "pp2-interleaved": (2, [PP2, "parallel.virtual_pipeline_parallel=2"]),
    "cp2": (2, ["parallel.context_parallel=2"]),
    "dp4-zero1": (4, []),
    "dp4-zero2": (4, [ZERO2]),
    "dp4-zero3": (4, [ZERO3]),
    "tp4": (4, [TP4]),
    "pp4": (4, [PP4]),
    "tp2-pp2": (4, [TP2, PP2]),
    "tp2-dp2": (4, [TP2]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, seconds and CPU time of a training step in many layouts.")
    parser.add_argument("--layouts", type=_names, default=list(LAYOUTS), help=f"some of {','.join(LAYOUTS)}")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each layout")
    parser.add_argument("--no-write", action="store_true", help="print the tables only")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    parser.add_argument("--worker", nargs=2, metavar=("LAYOUT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, folder = arguments.worker[0], Path(arguments.worker[1])
        config = _config(name, folder)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(measure(config, arguments.steps)))
        return
    # One thread, so that CPU time is work and not waiting.
    os.environ.update(OMP_NUM_THREADS="1", **QUIET)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for name in [REFERENCE, *(name for name in arguments.layouts if name != REFERENCE)]:
            run = runs[name] = _run(name, Path(folder), arguments.steps)
            _check_same_losses(name, run.losses, runs[REFERENCE].losses)
            print(
                f"{name}: {run.wall:.2f} s per step, CPU {run.cpu_total / runs[REFERENCE].cpu_total:.2f} × one "
                f"process's, {run.fullest.total / MIB:,.0f} MiB, {run.fullest.ratio():.3f} × predicted; "
                f"losses {' '.join(f'{loss:.4f}' for loss in run.losses)}",
                flush=True,
            )
    report = f"{_memory_table(runs)}\n\n{_time_table(runs)}"
    print(f"\n{report}")
    if not arguments.no_write:
        path = arguments.output / f"layouts_{date.today().isoformat()}.md"
        picture = path.with_suffix(".png")
        path.write_text(f"{_header(arguments, picture.name)}\n{report}\n", encoding="utf-8")
        draw(runs, picture)
        print(f"wrote {path} and {picture.name}")


@dataclass(frozen=True)
class Rank:
    """What one process measured. Bytes by cause, where the gradients are complete and the update has not begun."""

    bytes: dict[str, int]  # CAUSES and "other"
    kept_gradients: int  # bytes of gradients after the step
    predicted: dict[str, int]  # CAUSES
    peak_tensors: int  # of all tensors in a step, touched or not: what an accelerator would have to have
    peak_building: int  # resident bytes above the level after imports and process-group start
    peak_step: int
    wall: list[float]
    cpu: list[float]
    losses: list[float]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def ratio(self, *causes: str) -> float:
        """Measured ÷ predicted bytes, of all causes where none is named; "other" is left out."""
        causes = causes or CAUSES
        return sum(self.bytes[cause] for cause in causes) / sum(self.predicted[cause] for cause in causes)


@dataclass(frozen=True)
class Run:
    """A layout's ranks."""

    ranks: list[Rank]

    @property
    def fullest(self) -> Rank:
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def wall(self) -> float:
        return max(statistics.median(rank.wall) for rank in self.ranks)

    @property
    def cpu(self) -> list[float]:
        """Seconds per step of each rank."""
        return [statistics.median(rank.cpu) for rank in self.ranks]

    @property
    def cpu_total(self) -> float:
        return sum(self.cpu)

    @property
    def losses(self) -> list[float]:
        return self.ranks[0].losses


def measure(config: Config, steps: int) -> dict[str, Any]:
    """A `Rank`, on this rank."""
    from llada_train.parallel import topology

    topology.quiet_engines()
    from megatron.core import parallel_state

    from llada_train.data.loader import TrainingLoader
    from llada_train.data.rows import PretrainingData
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel.engine import Engine

    here = topology.initialize(config.parallel)
    size = config.training.global_batch_size
    loader = TrainingLoader(PretrainingData(config), config, here.place)
    batches = [loader.global_batch(i * size) for i in range(WARMUP_STEPS + steps + 1)]

    peak = _PeakMemory()
    engine = Engine(config, here)
    initial = InitialWeights(config.model, config.seed)
    engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    building = peak.above_level()
    wall_seconds, cpu_seconds, losses = [], [], []
    for i, global_batch in enumerate(batches[:-1]):
        if i == WARMUP_STEPS:
            peak.reset()
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(engine.train_step(global_batch, LEARNING_RATE)[0].loss)
        wall_seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    in_step = peak.above_level()

    kept = live_bytes(engine)
    update, counted = engine._engine.step, {}

    def count_and_update() -> None:
        counted.update(live_bytes(engine))
        update()

    engine._engine.step = count_and_update
    growth = _growth(lambda: engine.train_step(batches[-1], LEARNING_RATE))
    result = {
        "bytes": counted,
        "kept_gradients": kept["gradients"],
        "peak_tensors": sum(kept.values()) + growth,
        "predicted": predicted_bytes(config, here.world_size, parallel_state.get_pipeline_model_parallel_rank()),
        "peak_building": building,
        "peak_step": in_step,
        "wall": wall_seconds[WARMUP_STEPS:],
        "cpu": cpu_seconds[WARMUP_STEPS:],
        "losses": losses,
    }
    topology.shutdown()
    return result


def predicted_bytes(config: Config, world_size: int, pipeline_rank: int) -> dict[str, int]:
    """Bytes of each of CAUSES on one rank, as `llada-train plan` says."""
    layout = _layout(config, world_size)
    weights, gradients, optimizer = state(layout, layout.holdings[pipeline_rank])
    return {"weights": weights, "optimizer": optimizer, "gradients": gradients}


def _layout(config: Config, world_size: int) -> Layout:
    return Layout(config, world_size, config.data.sequence_length, config.training.global_batch_size)


def live_bytes(engine: "Engine") -> dict[str, int]:
    """Bytes of this process's tensors by cause; each storage counts once, whole, for the first cause that has it."""
    import torch

    optimizer = engine._engine.optimizer  # DeepSpeed's wrapper: of bf16 at ZeRO 1, of ZeRO 2, or of ZeRO 3
    adam = optimizer.optimizer
    parameters = [shard.parameter for shard in engine.shards]
    masters = [partition for group in adam.param_groups for partition in group["params"]]
    if engine.config.parallel.zero_stage == 3:  # there Adam's groups hold a partition only while it is updated
        masters += optimizer.fp32_partitioned_groups_flat
    gradients = [getattr(optimizer, name, None) for name in GRADIENT_BUFFERS]
    gradients += [getattr(tensor, name, None) for tensor in parameters + masters for name in ("grad", "grad_accum")]
    held_by = {
        "weights": [parameters, [getattr(parameter, "ds_tensor", None) for parameter in parameters]],
        "optimizer": [masters, [adam.state.get(master) for master in masters]],
        "gradients": gradients,
        "other": [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)],
    }
    seen: set[int] = set()
    found: Counter[str] = Counter(dict.fromkeys(held_by, 0))
    for cause, holders in held_by.items():
        for tensor in _tensors(holders):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[cause] += storage.nbytes()
    return dict(found)


def _tensors(holder: Any) -> Iterator["Tensor"]:
    import torch

    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, dict):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, Iterable) and not isinstance(holder, str):
        for item in holder:
            yield from _tensors(item)


def _growth(step: Callable[[], Any]) -> int:
    """By how many bytes this process's tensors grow during a step, at most; every allocation counts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


class _PeakMemory:
    """Resident memory above that at construction; `reset` forgets the peak so far, where the system allows it."""

    def __init__(self) -> None:
        self.reset()
        self._level = _status_bytes("VmRSS") or _max_resident_bytes()

    def reset(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def above_level(self) -> int:
        return (_status_bytes("VmHWM") or _max_resident_bytes()) - self._level


def _status_bytes(key: str) -> int | None:
    """A line of Linux's /proc/self/status; None on another system."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _max_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_table(runs: dict[str, Run]) -> str:
    """MiB of the process that holds most, each cause with its ratio to the prediction."""
    columns = [
        "layout",
        "processes",
        "weights (÷ predicted)",
        "master, moments",
        "gradients",
        "all else",
        "sum (mean of processes)",
        "gradients kept after the step",
        "peak of tensors in a step",
        "peak resident: building",
        "in a step",
    ]
    rows = [columns, ["---"] * len(columns)]
    for name, run in runs.items():
        fullest = run.fullest
        mean = statistics.mean(rank.total for rank in run.ranks)
        rows.append(
            [
                name,
                str(len(run.ranks)),
                *(f"{_mib(fullest.bytes[cause])} ({fullest.ratio(cause):.3f})" for cause in CAUSES),
                _mib(fullest.bytes["other"]),
                _mib(fullest.total) + (f" ({_mib(mean)})" if mean < 0.99 * fullest.total else ""),
                _mib(fullest.kept_gradients),
                *(
                    _mib(max(getattr(rank, peak) for rank in run.ranks))
                    for peak in ("peak_tensors", "peak_building", "peak_step")
                ),
            ]
        )
    ranks = [rank for run in runs.values() for rank in run.ranks]
    worst = max(abs(rank.ratio(cause) - 1) for rank in ranks for cause in CAUSES)
    return f"{_markdown(rows)}\n\nMeasured and predicted differ by at most {worst:.2%}, over all processes and causes."


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _time_table(runs: dict[str, Run]) -> str:
    reference = runs[REFERENCE].cpu_total
    columns = [
        "layout",
        "processes",
        "s per step",
        "CPU s of a process: most",
        "mean",
        "CPU s of all ÷ one process's",
        "waiting",
        "pipeline bubble predicted",
    ]
    rows = [columns, ["---"] * len(columns)]
    for name, run in runs.items():
        waiting = f"{1 - statistics.mean(run.cpu) / run.wall:.0%}" if len(run.ranks) <= (os.cpu_count() or 1) else ""
        rows.append(
            [
                name,
                str(len(run.ranks)),
                f"{run.wall:.2f}",
                f"{max(run.cpu):.2f}",
                f"{statistics.mean(run.cpu):.2f}",
                f"{run.cpu_total / reference:.2f}",
                waiting,
                _bubble(name),
            ]
        )
    return _markdown(rows)


def _bubble(name: str) -> str:
    """Share of a step in which a pipeline rank waits."""
    bubble = _layout(_config(name, ROOT), LAYOUTS[name][0]).bubble
    return f"{bubble:.0%}" if bubble else ""


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f}" if size < 10 * MIB else f"{size / MIB:,.0f}"


def draw(runs: dict[str, Run], path: Path) -> None:
    """Bytes by cause of each layout's fullest process as stacked bars; predicted sum as a line, peak as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"weights": "#4477aa", "optimizer": "#88bbdd", "gradients": "#ddaa33", "other": "#bbbbbb"}
    labels = {"weights": "bf16 weights", "optimizer": "fp32 master, moments", "gradients": "fp32 gradients"}
    figure, axes = plt.subplots(figsize=(10, 2 + 0.34 * len(runs)), layout="constrained")
    places: list[float] = []
    for previous, run in zip([None, *runs.values()], runs.values(), strict=False):
        gap = 0.6 if previous is not None and len(previous.ranks) != len(run.ranks) else 0.0
        places.append((places[-1] + 1 + gap) if places else 0.0)
    fullest = [run.fullest for run in runs.values()]
    left = [0.0] * len(runs)
    for cause, colour in colours.items():
        sizes = [rank.bytes[cause] / MIB for rank in fullest]
        axes.barh(places, sizes, left=left, height=0.72, color=colour, label=labels.get(cause, "all else"))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    predicted = [sum(rank.predicted.values()) / MIB for rank in fullest]
    axes.plot(predicted, places, "|", color="black", markersize=17, markeredgewidth=2, label="predicted sum")
    peaks = [max(rank.peak_tensors for rank in run.ranks) / MIB for run in runs.values()]
    axes.plot(peaks, places, "o", color="#aa3355", markersize=5, label="peak of tensors in a step")
    names = [f"{name}  ·  {len(run.ranks)}" for name, run in runs.items()]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("MiB of the process that holds most")
    axes.set_title("Memory by layout  ·  processes", loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(LAYOUTS)}")
    return names


def _config(name: str, data: Path) -> Config:
    processes, settings = LAYOUTS[name]
    return load_config(
        CONFIG,
        [
            *(f"model.{key}={value}" for key, value in MODEL.items()),
            f"data.tokenizer={data / 'tokenizer'}",
            f"data.corpora=[{{path: {data / 'corpus'}}}]",
            f"data.sequence_length={MODEL['max_sequence_length']}",
            "objective.random_length_probability=0",
            "training.precision=bf16",
            f"training.global_batch_size={GLOBAL_BATCH_SIZE}",
            f"training.micro_batch_size={MICRO_BATCH_SIZE}",
            *settings,
        ],
        world_size=processes,
    )


def _run(name: str, folder: Path, steps: int) -> Run:
    processes = LAYOUTS[name][0]
    command = [sys.executable, __file__, "--steps", str(steps), "--worker", name, str(folder)]
    if launch_local(processes, command):
        sys.exit(f"{name}: a process failed")
    return Run([Rank(**json.loads((folder / f"{rank}.json").read_text())) for rank in range(processes)])


def _check_same_losses(name: str, found: list[float], reference: list[float]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, reference, strict=True)):
        if not math.isclose(ours, theirs, rel_tol=LOSS_TOLERANCE):
            sys.exit(f"{name}: not the same work: loss {ours}, one process's {theirs}, at step {step}")


def _header(arguments: argparse.Namespace, picture: str) -> str:
    config = _config(REFERENCE, ROOT)
    model, training = config.model, config.training
    chosen = [] if arguments.layouts == list(LAYOUTS) else [f"--layouts {','.join(arguments.layouts)}"]
    return f"""# Layouts against one process and against arithmetic, {date.today().isoformat()}

{model.num_layers} layers, hidden size {model.hidden_size}, {parameter_count(model):,} parameters, bf16, rows of
{config.data.sequence_length} tokens, {training.global_batch_size} rows per step in micro-batches of
{training.micro_batch_size}, no cut rows. Every layout lost the same as one process at every step, within
{LOSS_TOLERANCE:.0%}. Processes of one thread; medians of {arguments.steps} steps after the first.

![memory by layout]({picture})

Memory is in MiB, of the process that holds most. Live tensors are counted where the gradients are complete and the
update has not begun. Predicted by `llada-train plan`: 2 bytes of each of the process's parameters for weights, 12 for
fp32 master and Adam's moments, 4 for fp32 gradients; ÷ DP × CP what ZeRO splits. The peak of tensors counts every
allocation of a step, also of pages that are never touched, as an accelerator has to. Resident memory is above the level
after imports, and holds what the C library has not given back.

With more processes than cores, seconds per step compare with each other only; the CPU time of all processes ÷ that of
one process is what shows wasted work. ZeRO 2 and 3 send every gradient after every micro-batch, which is small here,
and hold a bucket of up to 200 MB for it, which is more than they save on a model as small as this.
Waiting is 1 − CPU ÷ clock time; the bubble is (p − 1) ÷ (m·v + p − 1) for p
stages, m micro-batches, v chunks.

{machine_and_versions()}
- `python {" ".join(["benchmarks/layouts.py", *chosen, f"--steps {arguments.steps}"])}`
"""


if __name__ == "__main__":
    main()
