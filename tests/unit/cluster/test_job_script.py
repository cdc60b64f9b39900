"""Signals at moments that a real SLURM cannot be made to meet: the rendered script, with stubs as SLURM's programs."""

import os
import subprocess
from pathlib import Path

import pytest

from llada_train.cluster.render import pretrain_script
from llada_train.config.cluster import ClusterConfig

STUBS = {
    "bin/sleep": "exec /bin/sleep 0.02",
    "bin/scontrol": r"""
case "$*" in
    *hostnames*) echo n1 ;;
    requeue*) echo "$@" >>"$TOLD"; [ "$(grep -c requeue "$TOLD")" = "$TAKEN" ] ;;   # the controller restarts
    update*) echo "$@" >>"$TOLD" ;;
    *) [ -e "$TOLD.asked" ] && echo "JobId=7 JobState=RUNNING SubmitTime=2026-01-01T00:00:00 "; touch "$TOLD.asked" ;;
esac""",
    "bin/srun": r"""
case "$*" in
    *doctor*) exit 0 ;;
esac
echo training >>"$TOLD"
eval "$TRAINING"
for i in {1..500}; do /bin/sleep 0.02; done""",  # and is left behind by no test
    "environment/bin/python": r"""
case "$*" in
    *"job nodes"*) [ -e "$TOLD.chosen" ] || { touch "$TOLD.chosen"; exit 2; }
        printf n1 >"$LLADA_ATTEMPT/nodes"; [ "$BEFORE" ] && kill -USR1 $PPID; exit 0 ;;
    *"job begin"*) [ -e "$TOLD.begun" ] || { touch "$TOLD.begun"; exit 2; } ;;   # the shared disk was away
    *"job end"*) [ -e "$TOLD.ended" ] || { touch "$TOLD.ended"; exit 2; }
        printf n2 >"${LLADA_ATTEMPT%/*}/excluded"; echo "$@" | grep -o -e "--code.*" >>"$TOLD"; echo requeue ;;
    *"job refused"*) echo refused >>"$TOLD" ;;
esac""",
}
HEARD = "kill -USR1 $PPID"


def run_script(tmp_path: Path, taken: int, before: str = "", training: str = "") -> tuple[int, list[str]]:
    """Its exit code, and what it asked of others; SLURM takes the job again when asked for the `taken`th time."""
    for name, text in STUBS.items():
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    site = ClusterConfig.model_validate(
        {
            "slurm": {"checkpoint_seconds": 100},  # 15 signals before it is ended by force
            "node": {"gpus": 0, "processes": 1},
            "environment": {"path": tmp_path / "environment"},
            "health": {"links": False},
        }
    )
    script = pretrain_script(site, tmp_path / "run/slurm/0001", tmp_path / "run", 1, True)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "TOLD": str(tmp_path / "told"),
        "TAKEN": str(taken),
        "BEFORE": before,
        "TRAINING": training,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURMD_NODENAME": "n1",
    }
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, (tmp_path / "told").read_text().splitlines()


@pytest.mark.parametrize(
    ("before", "training", "code", "told"),
    [
        ("yes", "", 75, []),  # no training is begun that nobody would stop
        ("", f"n=0; trap '((++n < 2)) || exit 75' USR1; {HEARD}", 75, ["training"]),  # the first one was lost
        ("", f"trap '' USR1; {HEARD}", 75, ["training"]),  # it does not end before the limit would come
        ("", f"trap 'exit 70' USR1; {HEARD}", 70, ["training"]),  # it hung as it saved
        ("", f"trap 'exit 138' USR1; {HEARD}", 75, ["training"]),  # it did not listen yet
    ],
)
def test_whenever_the_signal_comes_the_job_is_queued_again(
    tmp_path: Path, before: str, training: str, code: int, told: list[str]
) -> None:
    ended = [f"--code {code} --state RUNNING", "requeue 7", "requeue 7"]  # refused once, and asked again
    left_out = ["update JobId=7 ExcNodeList=n2"]
    assert run_script(tmp_path, 2, before, training) == (code, [*told, *ended, *left_out])


def test_that_slurm_does_not_take_the_job_again_is_noted(tmp_path: Path) -> None:
    code, told = run_script(tmp_path, taken=99, training="exit 70")
    assert code == 70 and told[2:] == ["requeue 7"] * 12 + ["refused"]
