"""What a run tells of its life, for people and for `llada-train status`: who worked on it when, and is it alive?

history.jsonl, kept for ever, gets one line for each thing that happens to the run; heartbeat.json and ranks.json are
replaced again and again. Imports no torch.
"""

import json
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llada_train.checkpoint.manifest import Progress
from llada_train.config.errors import UserError

HISTORY_FILE = "history.jsonl"
HEARTBEAT_FILE = "heartbeat.json"
RANKS_FILE = "ranks.json"
HEARTBEAT_SECONDS = 5.0
STRAGGLER = 1.2  # times the median of all ranks' own time
STRAGGLER_SECONDS = 0.005  # and at least so much more of each step
STRAGGLER_REPORTS = 5  # in a row, and it is told: once may be chance

Record = dict[str, Any]


def note(run_dir: Path, event: str, **values: Any) -> None:
    """Add a line to the history of a run; in one write, so that lines of several processes do not mix.

    After a line that a full disk cut off, the new one begins on a line of its own.

    Raises:
        UserError: it cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": event, "time": now, **values}, ensure_ascii=False) + "\n"
    path = run_dir / HISTORY_FILE
    try:
        with path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(line.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; mend the folder's permissions") from None


def read_history(run_dir: Path) -> list[Record]:
    """The events of a run, oldest first. A line that a full disk cut off is passed over."""
    found = []
    with suppress(FileNotFoundError):
        for line in (run_dir / HISTORY_FILE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def read_state(path: Path) -> Record | None:
    """heartbeat.json or ranks.json; None: there is none yet."""
    try:
        state: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state


@dataclass
class StartTimes:
    """What a start took, part by part, in seconds: from the job's submission, where one was, to the end of a step."""

    began: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls) -> "StartTimes":
        """The parts before this process come from the job's script, in LLADA_START: `queue=… health_check=…`."""
        words = (word.partition("=") for word in os.environ.get("LLADA_START", "").split())
        return cls({name: float(began) for name, _, began in words} | {"imports": time.time()})

    def now(self, part: str) -> None:
        self.began.setdefault(part, time.time())

    def seconds(self) -> dict[str, float]:
        """By part, each until the next one began; the last until now."""
        ends = [*list(self.began.values())[1:], time.time()]
        return {part: round(end - begin, 3) for (part, begin), end in zip(self.began.items(), ends, strict=True)}


class Journal:
    """Rank 0's. What cannot be written once the run is at work is passed over: it ends no run."""

    def __init__(self, run_dir: Path, start: StartTimes, hang_timeout_seconds: float) -> None:
        """`hang_timeout_seconds`: without a sign of life for so long, the run is no longer at work."""
        self._run_dir, self._start, self._steps = run_dir, start, 0
        self._last_beat, self._doing, self._patience = 0.0, "training", hang_timeout_seconds
        self._slow_reports: Counter[int] = Counter()
        self._place: Record = {
            "job": int(job) if (job := os.environ.get("SLURM_JOB_ID", "")).isdecimal() else None,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }

    def started(self, progress: Progress, tokens: int, end_tokens: int, hosts: Sequence[str], device: str) -> None:
        """The run goes on from `progress`; `hosts` are those of the ranks, in their order; tokens are nominal.

        Raises:
            UserError: the history cannot be written.
        """
        self._close_what_broke_off()
        self._end_tokens, self._hosts = end_tokens, list(hosts)
        self._began = time.time()
        where = {"hosts": list(dict.fromkeys(hosts)), "processes": len(hosts), "device": device}
        note(self._run_dir, "started", **self._place, **where, **_reached(progress, tokens))
        self.beat(progress, tokens)

    def _close_what_broke_off(self) -> None:
        """An attempt that was killed could not say when; its last heartbeat says it."""
        before = [event for event in read_history(self._run_dir) if event["event"] in ("started", "ended")]
        beat = read_state(self._run_dir / HEARTBEAT_FILE)
        if before and before[-1]["event"] == "started" and beat is not None:
            reached = {key: beat[key] for key in ("step", "consumed_samples", "tokens")}
            note(self._run_dir, "ended", outcome="broke off", seconds=round(beat["time"] - beat["began"]), **reached)

    def beat(self, progress: Progress, tokens: int) -> None:
        """A step is done. Costs nothing but every few seconds, and after the first step."""
        if self._steps == 1:
            with suppress(UserError):
                note(self._run_dir, "first_step", **self._place, seconds=self._start.seconds())
        self._steps += 1
        self.doing("training", progress, tokens)

    def doing(self, what: str, progress: Progress, tokens: int) -> None:
        """What begins now: "training", "validating", "saving"."""
        known = self._steps > 2 and what == self._doing
        if known and time.monotonic() - self._last_beat < HEARTBEAT_SECONDS:
            return
        self._last_beat, self._doing = time.monotonic(), what
        times = {"time": time.time(), "began": self._began, "end_tokens": self._end_tokens}
        state = {"doing": what, "hang_timeout_seconds": self._patience, **times, **self._place}
        _replace(self._run_dir / HEARTBEAT_FILE, {**state, **_reached(progress, tokens)})

    def ranks(self, step: int, seconds: Sequence[Sequence[float]]) -> str | None:
        """Record each rank's own (computing, waiting for data) seconds per step; what to tell of stragglers, if new.

        Ranks that share rows (tensor, pipeline and context parallelism) wait for each other while they compute, so of
        them the slowest is not told apart.
        """
        own = [sum(parts) for parts in seconds]
        median = statistics.median(own)
        slow = [i for i, s in enumerate(own) if s > STRAGGLER * median and s - median > STRAGGLER_SECONDS]
        slow.sort(key=lambda i: -own[i])
        self._slow_reports = Counter({i: self._slow_reports[i] + 1 for i in slow})
        stragglers = [i for i in slow if self._slow_reports[i] >= STRAGGLER_REPORTS]
        state = {"step": step, "median": median, "stragglers": stragglers, "seconds": own, "hosts": self._hosts}
        _replace(self._run_dir / RANKS_FILE, state)
        slow = [i for i in stragglers if self._slow_reports[i] == STRAGGLER_REPORTS]
        if not slow:
            return None
        told = [f"rank {i} ({self._hosts[i]}) {own[i] / median:.2f}×" for i in slow[:3]]
        more = f" and {len(slow) - 3} more" if len(slow) > 3 else ""
        return f"slow: {', '.join(told)}{more} the median of {median:.3f} s per step"

    @contextmanager
    def telling_the_end(self, reached: Callable[[], tuple[Progress, int, bool]]) -> Iterator[None]:
        """Note how what is within ends: complete, stopped, or with an error; `reached` says how far it came."""
        outcome = None
        try:
            yield
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            progress, tokens, complete = reached()
            outcome = outcome or ("complete" if complete else "stopped")
            seconds = round(time.time() - self._began)
            with suppress(UserError):
                note(
                    self._run_dir,
                    "ended",
                    outcome=outcome,
                    seconds=seconds,
                    **self._place,
                    **_reached(progress, tokens),
                )


def _reached(progress: Progress, tokens: int) -> Record:
    return {"step": progress.step, "consumed_samples": progress.consumed_samples, "tokens": tokens}


def _replace(path: Path, state: Record) -> None:
    with suppress(OSError):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
        temporary.replace(path)
