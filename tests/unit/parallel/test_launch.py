import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_train.parallel import launch
from llada_train.parallel.launch import launch_local

RANK = "import os, signal, sys, time; from pathlib import Path; rank = int(os.environ['RANK']); "
STOPS = (
    RANK
    + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
    "Path(sys.argv[1], str(rank)).write_text(str(os.getpid())); time.sleep(60)"
)


def worker(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def started(folder: Path, processes: int) -> list[int]:
    """Process ids of the workers, once all run."""
    deadline = time.monotonic() + 30
    while len(found := [path.read_text() for path in folder.iterdir()]) < processes or not all(found):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(pid) for pid in found]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def in_its_own_process(processes: int, command: list[str]) -> "subprocess.Popen[bytes]":
    code = "import sys; from llada_train.parallel import launch; "
    code += "sys.exit(launch.launch_local(int(sys.argv[1]), sys.argv[2:]))"
    return subprocess.Popen([sys.executable, "-c", code, str(processes), *command])


def test_workers_know_their_place(tmp_path: Path) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    code = RANK + f"Path(sys.argv[1], str(rank)).write_text(' '.join(os.environ[name] for name in {names}))"
    assert launch_local(3, worker(code, tmp_path)) == 0
    places = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:4] for place in places] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({place[4] for place in places}) == 1


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_first_failure_ends_the_others_and_is_reported(tmp_path: Path, end: str, code: int) -> None:
    script = (
        RANK
        + f"""
if rank == 1:
    while not Path(sys.argv[1], '0').exists(): time.sleep(0.01)
    {end}
Path(sys.argv[1], '0').write_text(str(os.getpid()))
time.sleep(60)
"""
    )
    begin = time.monotonic()
    assert launch_local(2, worker(script, tmp_path)) == code
    assert time.monotonic() - begin < launch.GRACE_SECONDS
    assert gone(int((tmp_path / "0").read_text()))


def test_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    script = (
        RANK
        + """
if rank == 1:
    while not Path(sys.argv[1], '0').exists(): time.sleep(0.01)
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1], '0').write_text(str(os.getpid()))
time.sleep(60)
"""
    )
    assert launch_local(2, worker(script, tmp_path)) == 3
    assert gone(int((tmp_path / "0").read_text()))


def test_stopped_worker_lets_the_others_finish(tmp_path: Path) -> None:
    script = RANK + "rank or time.sleep(1); rank or Path(sys.argv[1], 'done').touch(); sys.exit(75)"
    assert launch_local(2, worker(script, tmp_path)) == 75
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_go_on_to_every_worker(tmp_path: Path, number: signal.Signals) -> None:
    launcher = in_its_own_process(3, worker(STOPS, tmp_path))
    workers = started(tmp_path, 3)
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) == 75
    assert all(map(gone, workers))


@pytest.mark.parametrize("joined", [False, True])
def test_workers_of_a_killed_launcher_stop(tmp_path: Path, joined: bool) -> None:
    """Only those that have joined the others are asked to, and may save; one that could not hear is killed."""
    script = (
        RANK
        + f"""
from llada_train.parallel.launch import outlive_launcher
def save(*_):
    Path(sys.argv[2], str(rank)).touch()
    os._exit(75)
signal.signal(signal.SIGTERM, save)
if {joined}: outlive_launcher()
Path(sys.argv[1], str(rank)).write_text(str(os.getpid()))
time.sleep(60)
"""
    )
    places, saved = tmp_path / "places", tmp_path / "saved"
    places.mkdir()
    saved.mkdir()
    launcher = in_its_own_process(2, worker(script, places, saved))
    workers = started(places, 2)
    launcher.kill()
    launcher.wait(timeout=30)
    assert all(map(gone, workers))
    assert len(list(saved.iterdir())) == (2 if joined else 0)


def test_a_signal_that_meets_a_worker_which_does_not_listen_yet_stops_the_run(tmp_path: Path) -> None:
    script = (
        RANK
        + """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda *_: None)  # remembers it, and waits for rank 1, which will not come
Path(sys.argv[1], str(rank)).write_text(str(os.getpid()))
time.sleep(60)
"""
    )
    launcher = in_its_own_process(2, worker(script, tmp_path))
    workers = started(tmp_path, 2)
    begin = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 75
    assert time.monotonic() - begin < launch.GRACE_SECONDS
    assert all(map(gone, workers))


def test_a_hang_is_reported_even_if_another_worker_ends_first(tmp_path: Path) -> None:
    script = (
        RANK
        + """
if rank == 0:
    while not Path(sys.argv[1], '1').exists(): time.sleep(0.01)
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(70))  # sent since rank 0 has failed
Path(sys.argv[1], '1').touch()
time.sleep(60)
"""
    )
    assert launch_local(2, worker(script, tmp_path)) == 70


def test_a_worker_whose_launcher_is_gone_does_not_start(tmp_path: Path) -> None:
    touch = worker("import sys; from pathlib import Path; Path(sys.argv[1]).touch()", tmp_path / "started")
    assert subprocess.run(touch, preexec_fn=lambda: launch._die_with(os.getpid())).returncode == 1
    assert not (tmp_path / "started").exists()


def test_launcher_needs_no_torch() -> None:
    code = "import sys, llada_train.parallel.launch, llada_train.training.preflight; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "MASTER_ADDR": "n1"}, 16),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}, 1),  # srun by hand: nobody said where to meet
        ({"SLURM_NTASKS": "16", "MASTER_ADDR": "n1"}, 1),  # a batch script, or a shell of salloc's
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "n1", "WORLD_SIZE": "8"}, 8),  # torchrun
    ],
)
def test_a_task_of_srun_knows_its_place(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], size: int
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    for name, value in {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    launch.adopt_place()
    assert launch.world_size() == size
    assert os.environ.get("RANK") == ("9" if size == 16 else None)
    assert os.environ.get("LOCAL_RANK") == ("1" if size == 16 else None)
