"""Runs watched and disturbed from outside: their processes, how far they are, and kill -9 at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import FOLDER, checkpoints, step_of
from llada_train.config.load import load_config
from llada_train.data.timeline import Timeline
from llada_train.training.metrics import METRICS_FILE, read_metrics

TIMINGS = {
    "tokens_per_second",
    "model_flops_per_second",
    "data_wait_seconds",
    "step_seconds",
    "step_seconds_median",
    "step_seconds_p99",
}
PATIENCE = 240.0  # seconds for anything that has to happen, on a machine with other things to do

Record = dict[str, Any]
Victims = Literal["one worker", "all", "launcher"]
Moment = Literal["saving", "training", "start-up"]
VICTIMS: tuple[Victims, ...] = ("one worker", "all", "launcher")
MOMENTS: tuple[Moment, ...] = ("saving", "training", "start-up")


class Run:
    """`llada-train pretrain CONFIG --processes 2` (or sft), or another command on the same config, at work."""

    def __init__(self, config: Path, command: list[str] | None = None) -> None:
        self.folder = config.parent / "run"
        self._mark = f"DISTURBED_RUN={config}".encode()
        self._first = last_step(self.folder)
        self._log, self._size, self._steps = self.folder / METRICS_FILE, 0, 0
        self._remnants = set(self._unfinished())
        kind = load_config(config).command
        self.launcher = subprocess.Popen(
            command or [sys.executable, "-m", "llada_train.cli", kind, str(config), "--processes", "2"],
            env={**os.environ, "DISTURBED_RUN": str(config)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self) -> int:
        """Steps that it has logged by itself, after what it goes on from."""
        size = self._log.stat().st_size if self._log.exists() else 0
        if size != self._size:
            self._size, self._steps = size, max(0, last_step(self.folder) - self._first)
        return self._steps

    def saves(self) -> set[str]:
        """Checkpoints that it is writing now."""
        return self._unfinished() - self._remnants

    def _unfinished(self) -> set[str]:
        return {path.name for path in (self.folder / FOLDER).glob("step-*.tmp")}

    def processes(self) -> dict[int, str | None]:
        """Those alive: process id → rank; None: the launcher."""
        found: dict[int, str | None] = {}
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue  # no process, or one that has just ended
            if self._mark in environment:
                rank = next((line[5:].decode() for line in environment if line.startswith(b"RANK=")), None)
                found[int(entry.name)] = rank
        return found

    def workers(self) -> list[int]:
        return sorted(process for process, rank in self.processes().items() if rank is not None)

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.launcher.communicate()
            time.sleep(0.005)

    def end(self) -> tuple[int, str, str]:
        """Wait until nothing of it lives: exit code, stdout, stderr."""
        output, errors = self.launcher.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        return self.launcher.returncode, output, errors

    def kill(self, processes: list[int]) -> None:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:  # ended by the death of the one before
                continue


@dataclass(frozen=True)
class Kill:
    victims: Victims
    moment: Moment
    seconds: float  # after the start of the processes
    logged_step: int  # when it was killed
    checkpoint_step: int  # from which it goes on

    @property
    def lost_steps(self) -> int:
        return max(0, self.logged_step - self.checkpoint_step)


def kill_and_go_on(config: Path, kills: int, seed: int) -> list[Kill]:
    """Start the run and kill it, so many times, each combination of victims and moment in turn; then let it end."""
    pick = random.Random(seed)
    found: list[Kill] = []
    start_up = 5.0  # seconds, as seen so far
    for i in range(kills):
        victims, moment = VICTIMS[(i + i // 3) % 3], MOMENTS[i % 3]
        run, begin = Run(config), time.monotonic()
        if moment == "start-up":
            until = begin + pick.uniform(0, 0.9 * start_up)
            run.wait_for(lambda run=run, until=until: run.workers() and (run.steps() or time.monotonic() > until))
        else:
            run.wait_for(run.steps)
            start_up = time.monotonic() - begin
            if moment == "training":
                steps = pick.randrange(1, 9)
                run.wait_for(lambda run=run, steps=steps: run.steps() >= steps)
            else:
                for _ in range(pick.randrange(3)):
                    run.wait_for(run.saves)
                    run.wait_for(lambda run=run: not run.saves())
                run.wait_for(run.saves)
            time.sleep(pick.uniform(0, 0.02))
        seconds, reached, logged = time.monotonic() - begin, run.steps(), last_step(run.folder)
        workers = run.workers()
        alone: dict[Victims, list[int]] = {"one worker": [pick.choice(workers)], "launcher": [run.launcher.pid]}
        run.kill(alone.get(victims) or pick.sample([run.launcher.pid, *workers], 1 + len(workers)))
        code, _, errors = run.end()
        assert code != 0, errors
        if moment == "start-up" and reached:
            moment = "training"
        found.append(Kill(victims, moment, seconds, logged, saved_step(run.folder)))
    code, _, errors = Run(config).end()
    assert (code, errors) == (0, "")
    return found


def report(kills: list[Kill], steps: int) -> str:
    """Markdown."""
    lines = [
        f"{len(kills)} times `kill -9`, on a run of 2 processes and {steps} steps with a checkpoint every 2, each",
        "time gone on with by the same command. In the end weights, Adam moments and every record of metrics.jsonl",
        "(each sample once, in order) were those of a run that nothing disturbed, bit for bit; no process and no",
        f"half-written file was left. {sum(kill.lost_steps for kill in kills)} steps were done again.",
        "",
        "| killed | " + " | ".join(MOMENTS) + " |",
        "|---|" + "---|" * len(MOMENTS),
    ]
    for victims in VICTIMS:
        counts = [sum((kill.victims, kill.moment) == (victims, moment) for kill in kills) for moment in MOMENTS]
        lines.append(f"| {victims} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| | killed | while | seconds after the start | logged step | goes on from | steps lost |"]
    lines += ["|---|" + "---|" * 6]
    for i, kill in enumerate(kills, start=1):
        place = f"{kill.logged_step} | {kill.checkpoint_step} | {kill.lost_steps}"
        lines.append(f"| {i} | {kill.victims} | {kill.moment} | {kill.seconds:.1f} | {place} |")
    return "\n".join(lines) + "\n"


def records(folder: Path) -> list[Record]:
    """Every record of metrics.jsonl without its timings."""
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in read_metrics(folder)]


def last_step(folder: Path) -> int:
    return max((int(record["step"]) for record in read_metrics(folder)), default=0)


def saved_step(folder: Path) -> int:
    return max(map(step_of, checkpoints(folder / FOLDER)), default=0)


def assert_same_run(config: Path, other: Path) -> None:
    """Two finished runs: samples, losses and norms of each step, and the final weights and moments, bit for bit."""
    one, two = (load_config(path) for path in (config, other))
    assert records(one.run_dir) == records(two.run_dir)
    size, end = one.training.global_batch_size, Timeline(one).end_samples
    consumed = [record["consumed_samples"] for record in records(one.run_dir) if record["kind"] == "train"]
    assert consumed == list(range(size, end + 1, size))
    newest = [checkpoints(run.run_dir / FOLDER)[-1] for run in (one, two)]
    with Checkpoint(newest[0]) as x, Checkpoint(newest[1]) as y:
        assert x.manifest.progress == y.manifest.progress and x.manifest.progress.consumed_samples == end
        assert x.manifest.files == y.manifest.files  # checksums: of the moments, too
        for name in x.names():
            assert torch.equal(x.read(name), y.read(name)), name
    assert not list(one.run_dir.rglob("*.tmp"))
