"""What a job decides: how often it starts without progress, whom it leaves out, when it is queued again."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llada_train.cluster.health import Report
from llada_train.cluster.job import COMPLETE_EXIT_CODE, EXCLUDED_FILE, Job
from llada_train.training.journal import HISTORY_FILE, note, read_history


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a submission."""
    folder = tmp_path / "run/slurm/0001"
    folder.mkdir(parents=True)
    (folder / "cluster.yaml").write_text("{slurm: {max_attempts: 3}, node: {gpus: 0, processes: 1}}")
    note(tmp_path / "run", "submitted", jobs=[7], nodes=2)
    return folder


def test_three_starts_without_a_checkpoint_and_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    consumed = 0
    monkeypatch.setattr(Job, "_consumed_samples", lambda self: consumed)

    def start(restart: int, code: int) -> tuple[bool, bool]:
        """Did it begin, and is it queued again?"""
        (folder / "job.log").write_text("")
        return Job(folder, 7, restart).begin(["n1"]) == 0, Job(folder, 7, restart).end(code, "RUNNING", True)

    assert [start(i, 1) for i in range(2)] == [(True, True)] * 2
    consumed = 100  # the second one saved
    assert [start(2 + i, 1) for i in range(3)] == [(True, True), (True, True), (True, False)]
    assert start(5, 1)[0] is False  # queued again by SLURM, whose node died
    note(folder.parents[1], "submitted", jobs=[8], nodes=2)  # a person mended it
    assert start(6, 1) == (True, True)


@pytest.mark.parametrize(
    ("code", "state", "requeue", "again"),
    [
        (0, "RUNNING", True, False),
        (2, "RUNNING", True, False),  # only a person can mend it
        (70, "RUNNING", True, True),
        (75, "RUNNING", True, True),
        (75, "", True, True),  # the controller does not answer
        (75, "COMPLETING", True, False),  # cancelled, or SLURM queues it again by itself
        (75, "RUNNING", False, False),  # a chain
        (137, "RUNNING", True, True),
    ],
)
def test_which_ends_are_queued_again(folder: Path, code: int, state: str, requeue: bool, again: bool) -> None:
    (folder / "job.log").write_text("")
    assert Job(folder, 7, 0).end(code, state, requeue) is again


def test_a_node_whose_processes_die_of_a_signal_is_left_out_and_others_are_not(folder: Path) -> None:
    log = folder / "job.log"
    unsound = "srun: error: n5: task 4: Exited with exit code 1\n"  # by its health check
    log.write_text(
        "x job 7, restart 0, trains on n1,n2,n3,n4\nsrun: error: n4: tasks 24-31: Killed\n"
        f"x job 7, restart 1, on n[1-5]\n{unsound}x job 7, restart 1, trains on n1,n2,n3,n4\n"
        "srun: error: n2: tasks 8,10-15: Bus error\nsrun: error: n3: task 16: Killed\n"
    )
    Job(folder, 7, 1).end(137, "RUNNING", True)
    assert (folder / EXCLUDED_FILE).read_text() == "n2"
    for restart, told in ((2, "Exited with exit code 1"), (3, "Aborted")):  # NCCL aborts who waits for others
        log.write_text(log.read_text() + f"x job 7, restart {restart}, trains on n1\nsrun: error: n1: task 0: {told}\n")
        Job(folder, 7, restart).end(1, "RUNNING", True)
        assert (folder / EXCLUDED_FILE).read_text() == "n2"
    log.write_text(
        log.read_text().replace("n1: task 0: Aborted", "n3: task 0: Killed") + f"x job 7, restart 4, on n1\n{unsound}"
    )
    Job(folder, 7, 4).end(1, "RUNNING", True)  # it did not come to train; what came before is not its
    assert [event["nodes"] for event in read_history(folder.parents[1]) if event["event"] == "left_out"] == [
        {"n2": ["its processes died of a signal"]}
    ]


def test_spares_take_the_place_of_bad_nodes_in_the_order_of_the_job(folder: Path) -> None:
    job, hosts = Job(folder, 7, 0), ["n1", "n2", "n3", "n4"]
    (job.attempt / "health").mkdir(parents=True)
    for host in ("n1", "n3", "n4"):
        report = Report(host, problems=["local disk: full"] if host == "n3" else [])
        (job.attempt / f"health/{host}.json").write_text(json.dumps(asdict(report)))
    assert job.choose_nodes(hosts, need=2, with_links=False)
    assert (job.attempt / "nodes").read_text() == "n1,n4"
    assert job.end(75, "RUNNING", True) and (folder / EXCLUDED_FILE).read_text() == "n2,n3"
    assert not job.choose_nodes(hosts, need=3, with_links=False)
    assert not job.choose_nodes(hosts, need=2, with_links=True)  # the nodes did not reach each other


def test_if_no_node_tells_anything_none_is_left_out(folder: Path) -> None:
    job = Job(folder, 7, 0)
    assert not job.choose_nodes(["n1", "n2"], need=1, with_links=False)
    assert job.end(4, "RUNNING", True) and (folder / EXCLUDED_FILE).read_text() == ""


def test_a_node_that_was_left_out_may_come_back(folder: Path) -> None:
    """Else a job of weeks has fewer and fewer nodes to be queued for."""
    job, history = Job(folder, 7, 0), folder.parents[1] / HISTORY_FILE
    long_ago = datetime.now(UTC) - timedelta(hours=job.cluster.health.exclude_hours + 1)
    for node, when in (("n1", long_ago), ("n2", datetime.now(UTC))):
        event = {"event": "left_out", "time": when.isoformat(), "nodes": {node: ["slow"]}, "exclude": True}
        history.write_text(history.read_text() + json.dumps(event) + "\n")
    assert job.end(75, "RUNNING", True) and (folder / EXCLUDED_FILE).read_text() == "n2"


def test_a_mistake_in_a_later_start_is_no_mistake_of_the_configs(folder: Path) -> None:
    """A lock that a dead node still holds, a disk that is away: the same run has trained before."""
    run, place = folder.parents[1], {"job": 7, "restart": 0}
    (folder / "job.log").write_text("")
    assert not Job(folder, 7, 0).end(2, "RUNNING", True)  # it has never trained
    note(run, "started", **place)
    assert not Job(folder, 7, 0).end(2, "RUNNING", True)  # it ended so by itself: bad steps, again and again
    assert Job(folder, 7, 1).end(2, "RUNNING", True) and read_history(run)[-1]["meaning"] == "failed"
    note(run, "submitted", jobs=[8], nodes=2)  # perhaps with other settings
    assert not Job(folder, 8, 0).end(2, "RUNNING", True)


def test_jobs_of_a_chain_that_are_not_needed_end_at_once(folder: Path) -> None:
    run = folder.parents[1]
    assert Job(folder, 7, 0).begin(["n1"]) == 0
    note(run, "started")
    note(run, "ended", outcome="complete")
    assert Job(folder, 8, 0).begin(["n1"]) == COMPLETE_EXIT_CODE
    note(run, "submitted", jobs=[9], nodes=2)  # perhaps with more tokens
    assert Job(folder, 9, 0).begin(["n1"]) == 0


def test_an_event_after_a_line_that_a_full_disk_cut_off_is_read(folder: Path) -> None:
    run = folder.parents[1]
    with (run / HISTORY_FILE).open("a") as file:
        file.write('{"event": "star')
    note(run, "started")
    assert [event["event"] for event in read_history(run)] == ["submitted", "started"]
