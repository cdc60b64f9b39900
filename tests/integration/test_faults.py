"""What happens to long runs: ranks that hang, kill -9, signals at any moment, files that vanish, two runs at once."""

import os
import signal
import sys
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, copy_corpus, sft_settings, write_config
from disturbed import PATIENCE, Run, assert_same_run, kill_and_go_on, last_step, report, saved_step

from llada_train.checkpoint.store import FOLDER

STEPS = 60
LAUNCH = "import sys; from llada_train.parallel.launch import launch_local; sys.exit(launch_local(2, sys.argv[1:]))"
# `llada-train pretrain`, but something happens to rank 1.
WORKER = """
import os, signal, sys, time
from llada_train.training.signals import StopRequest
def stop():
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGTERM)  # the launcher
    time.sleep(0.5)
def lose_the_launcher():
    import socket
    while True:  # until rank 0 waits for this one
        try:
            socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"]))).close()
            break
        except OSError:
            time.sleep(0.1)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)
if os.environ["RANK"] == "1":
    {"while importing": stop, "while another joins": lose_the_launcher}.get(sys.argv[1], lambda: None)()
StopRequest()
import llada_train.parallel.topology as topology
topology.quiet_engines()
import llada_train.training.pretrain as pretrain  # the slow imports are not what is watched here
from llada_train import cli
from llada_train.model.weights import InitialWeights
from llada_train.parallel.engine import Engine
DISTURBANCES = {
    "sleeps": (Engine, "train_step", lambda: time.sleep(3600)),
    "is stopped": (Engine, "train_step", lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "before the process group": (topology, "initialize", stop),
    "while weights are initialised": (InitialWeights, "read", stop),
}
def disturb(owner, name, disturbance, times):
    function, calls = getattr(owner, name), []
    def disturbed(*arguments):
        calls.append(name)
        if len(calls) == times:
            disturbance()
        return function(*arguments)
    setattr(owner, name, disturbed)
if os.environ["RANK"] == "1" and sys.argv[1] in DISTURBANCES:
    disturb(*DISTURBANCES[sys.argv[1]], times=3 if "train_step" in DISTURBANCES[sys.argv[1]] else 1)
sys.argv = ["llada-train", "pretrain", *sys.argv[2:]]
cli.main()
"""


def new_run(data: Path, folder: Path, steps: int = STEPS, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    small = {
        "model__num_layers": 2,
        "training__global_batch_size": 4,
        "checkpoint__interval_steps": 2,
        "validation__interval_steps": 20,
        "optimizer__learning_rate": [{"until_tokens": steps * 4 * 32, "end": 1e-3}],
    }
    return write_config(data, folder, **{**small, **settings})


def disturbed(config: Path, disturbance: str) -> Run:
    return Run(config, [sys.executable, "-c", LAUNCH, sys.executable, "-c", WORKER, disturbance, str(config)])


def fails(run: Run) -> str:
    """Expect the run to end with one message; returns it."""
    code, _, errors = run.end()
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = new_run(tiny_data, tmp_path_factory.mktemp("faults") / "undisturbed")
    code, _, errors = Run(config).end()
    assert (code, errors) == (0, "")
    return config


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_killed_at_random_moments_it_is_the_undisturbed_run(
    tiny_data: Path, tmp_path: Path, undisturbed: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    kills, steps, expected, settings = 3, STEPS, undisturbed, {}
    soak = request.config.getoption("kills")
    if soak is not None:
        kills, steps = soak, 12 * soak  # no kill takes it further than that
    if kind == "sft":
        kills = soak or 2
        settings = {
            **sft_settings(tiny_data),
            "optimizer__learning_rate": [{"until_tokens": steps * 4 * 64, "end": 1e-3}],
        }
    if soak is not None or settings:
        expected = new_run(tiny_data, tmp_path / "undisturbed", steps, **settings)
        assert Run(expected).end()[0] == 0
    config = new_run(tiny_data, tmp_path / "killed", steps, **settings)
    found = kill_and_go_on(config, kills, seed=kills)
    assert_same_run(config, expected)
    if soak is not None:
        name = "kills" if kind == "pretrain" else f"kills_{kind}"
        path = ROOT / f"benchmarks/results/{name}_{date.today().isoformat()}.md"
        path.write_text(report(found, steps), encoding="utf-8")


def test_signals_while_it_saves(tiny_data: Path, tmp_path: Path, undisturbed: Path) -> None:
    config = new_run(tiny_data, tmp_path / "stopped")
    run = Run(config)
    run.wait_for(run.saves)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        run.launcher.send_signal(number)
    code, output, errors = run.end()
    assert (code, errors) == (75, "")
    step = saved_step(run.folder)
    assert 0 < step == last_step(run.folder) < STEPS and f"stopped by a signal after step {step};" in output
    code, _, errors = Run(config).end()
    assert (code, errors) == (0, "")
    assert_same_run(config, undisturbed)


@pytest.mark.parametrize(
    ("moment", "saved"),
    [("while importing", 0), ("before the process group", 1), ("while weights are initialised", 1)],
)
def test_signals_while_it_starts(tiny_data: Path, tmp_path: Path, moment: str, saved: int) -> None:
    run = disturbed(new_run(tiny_data, tmp_path), moment)
    code, _, errors = run.end()
    assert (code, errors) == (75, "")
    assert saved_step(run.folder) == last_step(run.folder) == saved


def test_a_launcher_killed_while_some_wait_for_others(tiny_data: Path, tmp_path: Path) -> None:
    """No rank is left that waits for one which is gone."""
    run = disturbed(new_run(tiny_data, tmp_path), "while another joins")
    code, _, _ = run.end()
    assert (code, last_step(run.folder)) == (-signal.SIGKILL, 0)


@pytest.mark.parametrize("disturbance", ["sleeps", "is stopped"])
def test_a_rank_that_hangs_is_found(tiny_data: Path, tmp_path: Path, disturbance: str) -> None:
    run = disturbed(new_run(tiny_data, tmp_path, training__hang_timeout_seconds=20), disturbance)
    code, _, errors = run.end()  # and no process is left
    assert code == 70
    told = {rank: [line for line in errors.splitlines() if line.startswith(f"rank {rank}: ")] for rank in (0, 1)}
    heads = [line for line in errors.splitlines() if "no progress for" in line]
    assert all("no progress for 20 s in step 3;" in line for line in heads)
    assert len(heads) == (2 if disturbance == "sleeps" else 1)
    assert any("all_reduce" in line for line in told[0]) and any("thread MainThread" in line for line in told[0])
    if disturbance == "sleeps":
        assert any('File "<string>"' in line and "<lambda>" in line for line in told[1])
    assert last_step(run.folder) == 2 and saved_step(run.folder) in (
        0,
        2,
    )  # a save becomes a checkpoint at a step's end


def test_a_corpus_that_vanishes(tiny_data: Path, tmp_path: Path) -> None:
    """Cut mid-run: one message. Put back: the same command goes on. Removed then: it goes on being read."""
    corpora = [{"path": str(copy_corpus(tiny_data, tmp_path)), "validation_documents": 20}]
    config = new_run(tiny_data, tmp_path, steps=150, data__corpora=corpora)
    path = tmp_path / "corpus.bin"
    content = path.read_bytes()
    run = Run(config)
    run.wait_for(lambda: run.steps() >= 3)
    os.truncate(path, 0)
    assert f"{path}: has no byte" in fails(run)

    path.write_bytes(content)
    again = Run(config)
    again.wait_for(again.steps)
    for file in tmp_path.glob("corpus.*"):
        file.unlink()
    code, output, errors = again.end()
    assert (code, errors) == (0, "") and "resuming from" in output
    assert last_step(again.folder) == 150


def test_a_second_run_is_refused_and_a_lost_run_folder_told(tiny_data: Path, tmp_path: Path) -> None:
    config = new_run(tiny_data, tmp_path, steps=2000, checkpoint__max_failures=1)
    first = Run(config)
    first.wait_for(first.steps)
    second = Run(config)
    assert f"{first.folder}: another run is at work in it" in second.launcher.communicate(timeout=PATIENCE)[1]
    assert second.launcher.returncode == 2

    reached = first.steps()
    first.wait_for(lambda: first.steps() > reached)  # it did not notice
    root = first.folder / FOLDER
    root.rename(first.folder / "elsewhere")  # as if read-only: permissions do not bind root, who may run this
    root.write_text("not a folder")
    assert "the checkpoint could not be written" in fails(first)
