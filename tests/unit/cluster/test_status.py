import json
import time
from pathlib import Path
from typing import Any

import pytest

from llada_train.checkpoint.manifest import Progress
from llada_train.cluster.status import status, table
from llada_train.config.errors import UserError
from llada_train.training.journal import HEARTBEAT_FILE, Journal, StartTimes, note, read_history
from llada_train.training.metrics import METRICS_FILE

HANG_TIMEOUT = 1800.0
HOSTS = ["n1"] * 8 + ["n2"] * 8


def progress(step: int) -> Progress:
    return Progress(step=step, consumed_samples=step * 4)


def train_record(**values: Any) -> str:
    record = {"kind": "train", "step": 100, "tokens": 1000, "loss": 2.5, "step_seconds": 0.1}
    record |= {"step_seconds_median": 0.08, "step_seconds_p99": 0.2, "data_wait_seconds": 0.0005}
    rates = {"tokens_per_second": 100.0, "model_flops_per_second": 16 * 0.4 * 989.4e12}
    return json.dumps({**record, **rates, **values}) + "\n"


def test_mfu_time_left_and_the_life_of_a_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, StartTimes({"queue": time.time() - 60, "imports": time.time() - 20}), HANG_TIMEOUT)
    journal.started(progress(0), 0, 5000, HOSTS, "NVIDIA H100 80GB HBM3")
    for step in (1, 2):
        journal.beat(progress(step), step * 10)
    # Killed: nobody says so, and the next start does.
    journal = Journal(tmp_path, StartTimes({"imports": time.time()}), HANG_TIMEOUT)
    journal.started(progress(1), 10, 5000, HOSTS, "NVIDIA H100 80GB HBM3")
    journal.beat(progress(100), 1000)
    journal.beat(progress(101), 1010)  # too soon for the heartbeat
    (tmp_path / METRICS_FILE).write_text("x" * 300_000 + "\n" + train_record() + '{"kind": "tr')
    one = status(tmp_path)
    assert [event["event"] for event in read_history(tmp_path)] == [
        "started",
        "first_step",
        "ended",
        "started",
        "first_step",
    ]
    assert read_history(tmp_path)[2]["outcome"] == "broke off"
    assert one.mfu == pytest.approx(0.4) and one.seconds_left == pytest.approx(40)
    assert (one.state, one.step, one.restarts, one.processes) == ("training", 100, 1, 16)
    first = read_history(tmp_path)[1]["seconds"]
    assert first["queue"] == pytest.approx(40, abs=1) and first["imports"] == pytest.approx(20, abs=10)
    rows = dict(table(one))
    assert rows["speed"] == "100 tokens/s, MFU 40.0%"
    assert rows["steps"] == "median 0.080 s, p99 2.50× that, 0.5% waiting for data"
    assert rows["processes"] == "16 on n1, n2"

    beat = json.loads((tmp_path / HEARTBEAT_FILE).read_text())
    states = {("training", 60): "training", ("training", 600): "silent", ("validating", 600): "validating"}
    states |= {("saving", 600): "saving", ("validating", 3600): "broke off", ("training", 3600): "broke off"}
    for (doing, ago), state in states.items():
        (tmp_path / HEARTBEAT_FILE).write_text(json.dumps({**beat, "doing": doing, "time": beat["time"] - ago}))
        assert status(tmp_path).state == state
    note(tmp_path, "gave_up", attempts=3)
    assert status(tmp_path).state.startswith("gave up")


def test_a_start_that_fails_in_its_first_step_has_done_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path, StartTimes({"imports": time.time()}), HANG_TIMEOUT)
    journal.started(progress(0), 0, 5000, HOSTS, "cpu")
    with pytest.raises(RuntimeError), journal.telling_the_end(lambda: (progress(0), 0, False)):
        raise RuntimeError("out of memory")
    assert [event["event"] for event in read_history(tmp_path)] == ["started", "ended"]
    assert status(tmp_path).state == "RuntimeError: out of memory"


def test_stragglers_are_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, StartTimes({"imports": time.time()}), HANG_TIMEOUT)
    journal.started(progress(0), 0, 5000, HOSTS, "cpu")
    assert journal.ranks(10, [(0.5 + i / 1000, 0.0) for i in range(16)]) is None
    *before, told, after = [journal.ranks(20, [(0.5, 0.3 if i == 9 else 0.0) for i in range(16)]) for _ in range(6)]
    assert before == [None] * 4 and after is None  # once may be chance, and more often is known
    assert told == "slow: rank 9 (n2) 1.60× the median of 0.500 s per step"
    assert status(tmp_path).stragglers == [{"rank": 9, "host": "n2", "times_median": 1.6}]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        status(tmp_path)
