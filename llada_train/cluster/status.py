"""`llada-train status`: where a run is, from the files in its folder and, where there is one, SLURM. No torch."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llada_train.checkpoint.store import FOLDER, checkpoints, step_of
from llada_train.cluster import slurm
from llada_train.config.errors import UserError
from llada_train.plan.chips import chip_of_device
from llada_train.plan.flops import utilization
from llada_train.training.journal import HEARTBEAT_FILE, RANKS_FILE, read_history, read_state
from llada_train.training.metrics import METRICS_FILE

SILENT_SECONDS = 120.0  # at least, and some steps: then a heartbeat is late
TAIL_BYTES = 1 << 18
AT_WORK = ("starting", "training", "validating", "saving", "silent")  # states

Json = dict[str, Any]


@dataclass(frozen=True)
class Status:
    """Times in seconds; None: not known (yet)."""

    run: str
    state: str  # never started, one of AT_WORK, broke off, complete, stopped, …: how it ended
    jobs: dict[int, str]  # those that wait or run, as SLURM says
    step: int | None
    consumed_samples: int | None
    tokens: int | None  # nominal
    end_tokens: int | None
    loss: float | None
    held_out_bound: float | None
    tokens_per_second: float | None
    step_seconds_median: float | None  # of the recent steps
    step_seconds_p99: float | None
    data_wait_share: float | None  # of the time, waiting for batches
    mfu: float | None
    mfu_unknown_because: str | None
    seconds_left: float | None
    heartbeat_seconds_ago: float | None
    checkpoint: str | None
    checkpoint_step: int | None
    checkpoint_seconds_ago: float | None
    restarts: int
    wall_seconds: float  # of all starts together, without waiting in queues
    processes: int | None
    hosts: list[str]
    start_seconds: dict[str, float] | None  # of the last start, part by part
    rank_seconds_median: float | None  # per step, of each rank's own work
    stragglers: list[Json]
    left_out: dict[str, list[str]]  # nodes, and why


def status(run: Path) -> Status:
    """
    Raises:
        UserError: there is no run in the folder.
    """
    history, beat, ranks = read_history(run), read_state(run / HEARTBEAT_FILE), read_state(run / RANKS_FILE)
    if not history:
        raise UserError(f"{run}: no run: the folder has no history.jsonl")
    jobs = slurm.states([job for event in history if event["event"] == "submitted" for job in event["jobs"]])
    starts = [event for event in history if event["event"] == "started"]
    first_steps = [event["seconds"] for event in history if event["event"] == "first_step"]
    now = time.time()
    train, bound = _last(run, "train"), _last(run, "validation")
    saved = checkpoints(run / FOLDER)
    start = starts[-1] if starts else None
    where = _merged([event for event in history if "tokens" in event], beat)
    rate = train["tokens_per_second"] if train else None
    end_tokens = beat["end_tokens"] if beat else None
    mfu, because = _mfu(train, start)
    state = _state(history, beat, train, now)
    return Status(
        run=str(run),
        state=state,
        jobs=jobs,
        step=where.get("step"),
        consumed_samples=where.get("consumed_samples"),
        tokens=where.get("tokens"),
        end_tokens=end_tokens,
        loss=train["loss"] if train else None,
        held_out_bound=bound["bound"] if bound else None,
        tokens_per_second=rate,
        step_seconds_median=train["step_seconds_median"] if train else None,
        step_seconds_p99=train["step_seconds_p99"] if train else None,
        data_wait_share=train["data_wait_seconds"] / train["step_seconds"] if train else None,
        mfu=mfu,
        mfu_unknown_because=because,
        seconds_left=(end_tokens - where["tokens"]) / rate if rate and end_tokens is not None else None,
        heartbeat_seconds_ago=now - beat["time"] if beat else None,
        checkpoint=saved[-1].name if saved else None,
        checkpoint_step=step_of(saved[-1]) if saved else None,
        checkpoint_seconds_ago=now - saved[-1].stat().st_mtime if saved else None,
        restarts=max(0, len(starts) - 1),
        wall_seconds=_wall_seconds(history, beat),
        processes=start["processes"] if start else None,
        hosts=start["hosts"] if start else [],
        start_seconds=first_steps[-1] if first_steps else None,
        rank_seconds_median=ranks["median"] if ranks else None,
        stragglers=_stragglers(ranks),
        left_out={
            node: why for event in history if event["event"] == "left_out" for node, why in event["nodes"].items()
        },
    )


def _last(run: Path, kind: str) -> Json | None:
    """The last record of its kind among the last ones of metrics.jsonl, which is long after weeks."""
    try:
        with (run / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):
        if f'"kind": "{kind}"'.encode() in line and line.startswith(b"{"):
            record: Json = json.loads(line)
            return record
    return None


def _merged(events: Sequence[Json], beat: Json | None) -> Json:
    """Where the run stands: the later of the last event and the heartbeat."""
    last = events[-1] if events else {}
    if beat and (not last or last["event"] == "started"):
        return beat
    return last


def _state(history: Sequence[Json], beat: Json | None, train: Json | None, now: float) -> str:
    for event in reversed(history):
        if event["event"] == "ended":
            return str(event["outcome"])
        if event["event"] == "gave_up":
            return "gave up: too many starts without a new checkpoint"
        if event["event"] == "requeue_refused":
            return "ended: SLURM would not queue it again"
        if event["event"] == "job_ended" and event["code"]:
            return str(event["meaning"])
        if event["event"] == "started" and beat is not None:
            silent, step = now - beat["time"], 10 * train["step_seconds"] if train else 0.0
            if silent > beat["hang_timeout_seconds"] + SILENT_SECONDS:  # it would have ended itself
                return "broke off"
            training = beat["doing"] == "training"
            return "silent" if training and silent > max(SILENT_SECONDS, step) else str(beat["doing"])
        if event["event"] == "attempt":
            return "starting"
    return "never started"


def _mfu(train: Json | None, start: Json | None) -> tuple[float | None, str | None]:
    """Model FLOPs per second over the peak of all GPUs; or why it is not known."""
    if train is None or start is None:
        return None, "no step is logged yet"
    chip = chip_of_device(start["device"])
    if chip is None:
        return None, f"the peak of a {start['device']} is not known"
    return utilization(train["model_flops_per_second"], chip.peak_flops, start["processes"]), None


def _wall_seconds(history: Sequence[Json], beat: Json | None) -> float:
    ended = sum(event["seconds"] for event in history if event["event"] == "ended")
    at_work = beat is not None and [e["event"] for e in history if e["event"] in ("started", "ended")][-1:] == [
        "started"
    ]
    return float(ended + (beat["time"] - beat["began"] if at_work and beat is not None else 0))


def _stragglers(ranks: Json | None) -> list[Json]:
    if ranks is None:
        return []
    seconds, hosts, median = ranks["seconds"], ranks["hosts"], ranks["median"]
    return [{"rank": i, "host": hosts[i], "times_median": round(seconds[i] / median, 2)} for i in ranks["stragglers"]]


def table(one: Status) -> list[tuple[str, str]]:
    """(what, value) for people."""
    rows: list[tuple[str, str]] = [("run", one.run), ("state", one.state)]

    def add(name: str, value: str | None) -> None:
        if value is not None:
            rows.append((name, value))

    add("jobs", ", ".join(f"{job} {state}" for job, state in one.jobs.items()) or None)
    if one.step is not None and one.tokens is not None:
        share = f" of {one.end_tokens:,} ({one.tokens / one.end_tokens:.1%})" if one.end_tokens else ""
        add("step", f"{one.step:,}, {one.tokens:,} tokens{share}")
    if one.loss is not None:
        bound = f", held-out bound {one.held_out_bound:.4f}" if one.held_out_bound is not None else ""
        add("loss", f"{one.loss:.4f}{bound} nats/token")
    if one.tokens_per_second is not None:
        mfu = f"MFU {one.mfu:.1%}" if one.mfu is not None else f"no MFU: {one.mfu_unknown_because}"
        add("speed", f"{one.tokens_per_second:,.0f} tokens/s, {mfu}")
    if one.step_seconds_median and one.step_seconds_p99 and one.data_wait_share is not None:
        evenly = f"p99 {one.step_seconds_p99 / one.step_seconds_median:.2f}× that"
        add("steps", f"median {one.step_seconds_median:.3f} s, {evenly}, {one.data_wait_share:.1%} waiting for data")
    if one.seconds_left is not None:
        add("time left", "none" if one.seconds_left <= 0 else _duration(one.seconds_left))
    if one.checkpoint is not None and one.checkpoint_seconds_ago is not None:
        add("checkpoint", f"{one.checkpoint}, {_duration(one.checkpoint_seconds_ago)} ago")
    if one.heartbeat_seconds_ago is not None:
        add("heartbeat", f"{_duration(one.heartbeat_seconds_ago)} ago")
    add("life", f"{one.restarts} restarts, {_duration(one.wall_seconds)} of work")
    if one.processes is not None:
        add("processes", f"{one.processes} on {', '.join(one.hosts[:8])}{' …' if len(one.hosts) > 8 else ''}")
    if one.start_seconds:
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in one.start_seconds.items())
        add("last start", f"{sum(one.start_seconds.values()):.1f} s to the first step: {parts}")
    if one.rank_seconds_median is not None:
        slow = ", ".join(f"rank {s['rank']} ({s['host']}) {s['times_median']}×" for s in one.stragglers[:5])
        add("ranks", f"median {one.rank_seconds_median:.3f} s per step; {'slow: ' + slow if slow else 'none is slow'}")
    for node, why in one.left_out.items():
        add("left out", f"{node}: {'; '.join(why)}")
    return rows


def _duration(seconds: float) -> str:
    """93784 → 1 d 2 h"""
    seconds = round(seconds)
    for size, unit, smaller, its in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size} {unit}" + (f" {rest} {its}" if rest else "")
    return f"{seconds} s"


def told_at() -> str:
    return datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
