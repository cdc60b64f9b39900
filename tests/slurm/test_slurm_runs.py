"""Runs on a real SLURM of two nodes, by sbatch files that `submit` made: to the end, through all that comes between."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cluster import Cluster, SubmittedRun
from conftest import sft_settings, write_config
from disturbed import assert_same_run, last_step, saved_step

from llada_train.cluster.job import EXCLUDED_FILE

STEPS = 100


def new_run(data: Path, folder: Path, steps: int = STEPS, **settings: object) -> Path:
    folder.mkdir()
    small = {
        "model__num_layers": 2,
        "training__global_batch_size": 8,
        "checkpoint__interval_steps": 20,
        "validation__interval_steps": 50,
        "optimizer__learning_rate": [{"until_tokens": steps * 8 * 32, "end": 1e-3}],
    }
    return write_config(data, folder, **{**small, **settings})


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SubmittedRun:
    """Finished; its folder has a space in its name."""
    config = new_run(tiny_data, tmp_path_factory.mktemp("slurm") / "un disturbed")
    run = SubmittedRun(slurm, config, 2, "cluster.health.links=true")
    assert run.end() == "COMPLETED", run.logs()
    return run


def test_a_two_node_job_to_its_end(slurm: Cluster, undisturbed: SubmittedRun) -> None:
    run = undisturbed
    assert last_step(run.folder) == saved_step(run.folder) == STEPS
    attempt = run.submission / f"attempt-{run.job}-0"
    assert f"step     {STEPS}" in (attempt / "rank-0.log").read_text()  # the others have a log for each node
    assert "step" not in (attempt / "n2.log").read_text()
    links = json.loads((attempt / "health/links.json").read_text())
    assert [pair[:2] for pair in links["pairs"]] == [["n1", "n2"]] and links["all_reduce"] > 0
    status = run.status()
    assert (status["state"], status["step"], status["processes"], status["hosts"]) == (
        "complete",
        STEPS,
        2,
        ["n1", "n2"],
    )
    assert status["tokens"] == status["end_tokens"] == STEPS * 8 * 32 and status["seconds_left"] == 0
    assert status["mfu"] is None and "cpu" in status["mfu_unknown_because"]
    assert status["checkpoint_step"] == STEPS and status["restarts"] == 0 and status["jobs"] == {}
    parts = ["queue", "health_check", "launch", "imports", "joining", "model", "weights", "first_step"]
    assert list(status["start_seconds"]) == parts and all(seconds >= 0 for seconds in status["start_seconds"].values())
    assert len(json.loads((run.folder / "ranks.json").read_text())["seconds"]) == 2
    watched = slurm.llada_train("status", run.folder, "--watch")  # ends, since the run is over
    assert watched.returncode == 0 and "complete" in watched.stdout and "s per step" in watched.stdout


def test_time_limit_preemption_cancellation(
    slurm: Cluster, tiny_data: Path, tmp_path: Path, undisturbed: SubmittedRun
) -> None:
    """Each ends in a checkpoint; the first two in another start by itself. Then it is the undisturbed run."""
    config = new_run(tiny_data, tmp_path / "stopped")
    run = SubmittedRun(slurm, config)
    refused = slurm.llada_train("submit", config, "--nodes", 2, "--cluster", "configs/cluster/cpu.yaml")
    assert refused.returncode == 2 and f"job {run.job} of this run is" in refused.stderr

    processes = run.held(restart=0)
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=2")  # SLURM signals a minute before
    run.signalled(processes, signal.SIGUSR1)
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    run.held(restart=1)  # SLURM wakes whom it ends
    urgent = slurm.output(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    )
    slurm.wait_for_job(int(urgent), "COMPLETED")
    run.held(restart=2)
    slurm.run("scancel", run.job)
    assert run.end() == "CANCELLED"
    assert 0 < saved_step(run.folder) == last_step(run.folder) < STEPS
    ends = [(e["restart"], e["meaning"], e["requeue"]) for e in run.events("job_ended")]
    assert ends == [(i, "stopped by a signal", i < 2) for i in range(3)]
    assert [e["restart"] for e in run.events("started")] == [0, 1, 2]  # SLURM_RESTART_COUNT
    steps = [e["step"] for e in run.events("ended")]
    assert steps == sorted(set(steps)) and run.events("started")[2]["step"] == steps[1]

    again = SubmittedRun(slurm, config)
    assert again.end() == "COMPLETED", again.logs()
    assert_same_run(config, undisturbed.config)
    status = again.status()
    assert status["restarts"] == 3 and status["wall_seconds"] == sum(e["seconds"] for e in run.events("ended"))


def test_a_hang_and_a_node_that_dies(
    slurm: Cluster, tiny_data: Path, tmp_path: Path, undisturbed: SubmittedRun
) -> None:
    config = new_run(tiny_data, tmp_path / "run", training__hang_timeout_seconds=40)
    run = SubmittedRun(slurm, config)
    processes = run.held(restart=0)
    os.kill(processes["n1"], signal.SIGCONT)
    attempt = run.submission / f"attempt-{run.job}-0"
    slurm.wait_for((attempt / "flight-recorder-0.json").exists)
    os.kill(processes["n2"], signal.SIGCONT)  # it notices, too, that time has passed
    run.held(restart=1)
    assert "no progress for" in (attempt / "rank-0.log").read_text()
    assert json.loads((attempt / "flight-recorder-0.json").read_text())["entries"]
    assert [e["meaning"] for e in run.events("job_ended")] == ["hung"] and run.events("job_ended")[0]["requeue"]

    slurm.kill_node("n2")
    slurm.wait_for(lambda: "down" in slurm.output("sinfo", "-h", "-n", "n2", "-p", "main", "-o", "%T"), 0.5)
    slurm.start_node("n2")
    assert run.end() == "COMPLETED", run.logs()
    assert int(slurm.job(run.job, "Restarts")) == 2
    outcomes = [e["outcome"] for e in run.events("ended")]  # the second: if it could still tell, a lost connection
    assert (len(outcomes), outcomes[0], outcomes[2]) == (3, "broke off", "complete")
    assert_same_run(config, undisturbed.config)


def test_a_bad_node_is_left_out(slurm: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Its local disk is full. With a spare the job, of fine-tuning, goes on without it; else it waits for others."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)
    slurm.run(*slurm.on_node("n1", "mount", "-t", "tmpfs", "-o", "size=64k", "none", scratch))
    site = ("cluster.spares=1", f"cluster.local_scratch={scratch}", "cluster.health.min_free_disk_gb=0.00001")
    try:
        phases = {"optimizer__learning_rate": [{"until_steps": 5, "end": 1e-3}]}
        run = SubmittedRun(slurm, new_run(tiny_data, tmp_path / "spare", **sft_settings(tiny_data), **phases), 1, *site)
        assert run.end() == "COMPLETED", run.logs()
        assert run.status()["hosts"] == ["n2"] and last_step(run.folder) == 5
        (reason,) = run.status()["left_out"]["n1"]
        assert reason == f"local disk {scratch}: No space left on device"
        assert f"n1: left out: {reason}" in (run.submission / "job.log").read_text()

        run = SubmittedRun(slurm, new_run(tiny_data, tmp_path / "none", steps=5), 2, "cluster.spares=0", *site[1:])
        slurm.wait_for(lambda: slurm.job(run.job, "ExcNodeList") == "n1")
        slurm.wait_for_job(run.job, "PENDING")
        assert (run.submission / EXCLUDED_FILE).read_text() == "n1"
        assert run.events("job_ended")[0]["meaning"] == "too few sound nodes" and not run.events("started")
        slurm.run("scancel", run.job)
    finally:
        slurm.run(*slurm.on_node("n1", "umount", scratch))


def test_no_progress_no_more_starts(slurm: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, again and again: two starts, then it is left to a person."""
    config = new_run(tiny_data, tmp_path / "run", checkpoint__interval_steps=10_000)
    run = SubmittedRun(slurm, config, 1, "cluster.slurm.max_attempts=2", "cluster.slurm.partition=main")
    for restart in range(2):
        (process,) = run.held(restart).values()
        os.kill(process, signal.SIGKILL)
        slurm.wait_for(lambda restart=restart: len(run.events("job_ended")) == restart + 1)
    assert run.end() == "FAILED"
    assert [e["requeue"] for e in run.events("job_ended")] == [True, False]
    # Processes that die of a signal may have died of their node: the second start was on the other one.
    assert len({e["host"] for e in run.events("started")}) == 2 and len(run.status()["left_out"]) == 2


def test_a_chain_and_a_staged_environment(slurm: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Two jobs, the second after the first, which ends at its time limit; the environment is unpacked on the node."""
    environment = small_environment(tmp_path / "environment")
    config = new_run(tiny_data, tmp_path / "run")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    site = (
        f"cluster.environment.path={environment}",
        "cluster.environment.stage=true",
        f"cluster.local_scratch={scratch}",
    )
    run = SubmittedRun(slurm, config, 1, "--chain", "2", *site)
    processes = run.held(restart=0)
    slurm.run("scancel", "--signal=USR1", "--batch", run.job)
    run.signalled(processes, signal.SIGUSR1)
    first, run.job = run.job, run.jobs[1]
    assert run.end() == "COMPLETED", run.logs()
    assert slurm.job(first, "Restarts") == "0" and last_step(run.folder) == STEPS
    assert [e["job"] for e in run.events("started")] == run.jobs and "staging" in run.status()["start_seconds"]
    (staged,) = scratch.glob("llada-train-*/environment-*")
    assert (staged / "bin/python").exists()


def small_environment(folder: Path) -> Path:
    """A virtual environment that borrows the packages of this one, and the archive of it beside."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(["tar", "-C", folder, "-cf", f"{folder}.tar", "."], check=True)
    return folder
