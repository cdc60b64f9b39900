"""What the guards cost in a step: time of their parts on two gloo processes, as a share of the demo model's step.

A step's time scatters by more than the guards take, so their parts are timed by themselves, many times, and compared
with the step's median: the question whether a step is applied (one reduction over all ranks), the guard's own
decision with a full window, the watchdog's beat, and the reductions by which ranks fail and stop together.

    python benchmarks/guards.py            # table, and benchmarks/results/guards_DATE.md
    python benchmarks/guards.py --no-write
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from common import ROOT, machine_and_versions, make_data

PROCESSES = 2
STEPS = 12  # of which the first two are left out
REPEATS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description="What the guards cost in a step.")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(Path(arguments.worker))
        return
    from llada_train.parallel.launch import free_port

    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        place = f"WORLD_SIZE={PROCESSES} MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()} OMP_NUM_THREADS=1".split()
        command = [sys.executable, __file__, "--worker", folder]
        workers = [
            subprocess.Popen(["env", *place, f"RANK={r}", f"LOCAL_RANK={r}", *command], stdout=subprocess.PIPE)
            for r in range(PROCESSES)
        ]
        said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a process failed")
    report = table(json.loads(said[0]))
    print(report)
    if not arguments.no_write:
        path = ROOT / f"benchmarks/results/guards_{date.today().isoformat()}.md"
        header = f"# What the guards cost in a step, {date.today().isoformat()}\n\n{machine_and_versions()}\n"
        how = f"- {PROCESSES} gloo processes, the demo's model, fp32; `python benchmarks/guards.py`\n"
        path.write_text(f"{header}{how}\n{report}\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def measure(folder: Path) -> None:
    """One process; the first prints the seconds of a step and of each part."""
    from llada_train.parallel import topology

    topology.quiet_engines()
    import torch
    import torch.distributed as dist

    from llada_train.checkpoint.manifest import GuardState
    from llada_train.config.load import load_config
    from llada_train.config.schema import GuardConfig
    from llada_train.data.loader import TrainingLoader
    from llada_train.data.rows import PretrainingData
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel.engine import Engine
    from llada_train.training.guard import Guard
    from llada_train.training.watchdog import Watchdog

    overrides = [f"data.tokenizer={folder / 'tokenizer'}", f"data.corpora=[{{path: {folder / 'corpus'}}}]"]
    config = load_config(ROOT / "configs/pretrain/demo.yaml", overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = Engine(config, here)
    initial = InitialWeights(config.model, config.seed)
    engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    loader = TrainingLoader(PretrainingData(config), config, here.place)
    steps = []
    for number in range(STEPS):
        batches = loader.global_batch(number * config.training.global_batch_size)
        started = time.perf_counter()
        engine.train_step(batches, 1e-3)
        steps.append(time.perf_counter() - started)

    guard = Guard(GuardConfig(spike_factor=10), GuardState(norms=(1.0,) * 128))
    flag = torch.zeros((), dtype=torch.int)

    def decide() -> None:
        guard.accepts(2.0, 1.0)
        guard.applied(1.0)

    def fail_together() -> None:
        with here.failing_together():
            pass

    with Watchdog(1800, here.rank) as watchdog:
        parts: dict[str, Callable[[], object]] = {
            "is the step applied? (reduction)": lambda: dist.all_reduce(flag, op=dist.ReduceOp.MAX),
            "the guard's decision": decide,
            "the watchdog's beat": lambda: watchdog.beat("step 1"),
            "failing together (reduction)": fail_together,
            "stopping and saving together (reduction)": lambda: topology.any_rank(False, False, device=here.device),
        }
        seconds = {"step": statistics.median(steps[2:]), **{name: _seconds(part) for name, part in parts.items()}}
    if here.is_main:
        print(json.dumps(seconds))
    topology.shutdown()


def _seconds(part: Callable[[], object]) -> float:
    """Median of ten means."""
    means = []
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(REPEATS // 10):
            part()
        means.append((time.perf_counter() - started) / (REPEATS // 10))
    return statistics.median(means)


def table(seconds: dict[str, float]) -> str:
    step = seconds.pop("step")
    rows = [*seconds.items(), ("together", sum(seconds.values()))]
    lines = ["| in each step | µs | of a step |", "|---|---|---|"]
    lines += [f"| {name} | {1e6 * value:.0f} | {value / step:.3%} |" for name, value in rows]
    return "\n".join([*lines, f"| the step itself | {1e6 * step:.0f} | |"])


if __name__ == "__main__":
    main()
