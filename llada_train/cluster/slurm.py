"""The few SLURM commands that are called, and what they say when they refuse."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from llada_train.config.errors import UserError

# What a process of another job, or of a launcher, was told is not for the new job.
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LLADA_ATTEMPT", "LLADA_START")
SECONDS = 60.0  # a controller that does not answer


class NoAnswerError(UserError):
    """SLURM's controller did not answer in time; what it was asked may be done or not."""


def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's programs.

    Raises:
        UserError: it is not there.
        NoAnswerError: it was too late.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and (not name.startswith("SLURM_") or name in kept)
    }
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"{program}: not found: this is done on a login node of a SLURM cluster; without SLURM start the run "
            "with torchrun on each machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{program}: SLURM's controller does not answer; try again later") from None


def sbatch(script: Path, dependency: str | None = None) -> int:
    """Submit a file; returns the job's id.

    Raises:
        UserError: SLURM refuses it.
        NoAnswerError: it may be queued, or not.
    """
    # Else a job whose dependency has failed would wait for ever.
    after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    done = call("sbatch", "--parsable", *after, str(script))
    if done.returncode:
        told = [
            line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()
        ]
        reason = told[-1].removeprefix("Batch job submission failed: ") if told else f"exit code {done.returncode}"
        if "contact" in reason or "onnection" in reason:
            raise UserError(f"sbatch: {reason}; SLURM's controller cannot be reached from here now: try again later")
        raise UserError(f"SLURM refuses the job: {reason}{_hint(reason)}")
    return int(done.stdout.strip().partition(";")[0])


def check_nodes(partition: str | None, nodes: int) -> None:
    """A job that wants more nodes than its partition has would wait for ever: SLURM takes it.

    Raises:
        UserError: it has fewer.
    """
    found: dict[str, int] = {}
    default = None
    for line in call("sinfo", "--noheader", "--format=%P|%D").stdout.splitlines():
        name, _, count = line.strip().partition("|")
        default = name.removesuffix("*") if name.endswith("*") else default
        found[name.removesuffix("*")] = found.get(name.removesuffix("*"), 0) + int(count)
    names = (partition or default or "").split(",")
    if all(name in found for name in names) and (most := max(found[name] for name in names)) < nodes:
        raise UserError(
            f"{nodes} nodes are asked for, spares included, but partition {','.join(names)} has {most}: the job would "
            "wait for ever; give fewer --nodes, or another cluster.slurm.partition"
        )


def cancel(job: int) -> None:
    """
    Raises:
        UserError: there is no SLURM.
    """
    call("scancel", str(job))


def _hint(reason: str) -> str:
    if "partition" in reason.lower():
        try:
            found = call("sinfo", "--noheader", "--format=%R").stdout.split()
        except UserError:
            return ""
        return f"; cluster.slurm.partition can be {', '.join(dict.fromkeys(found))}"
    if "account" in reason.lower():
        return "; give cluster.slurm.account=…, `sacctmgr show associations user=$USER` lists yours"
    if "feature" in reason.lower():
        return "; cluster.slurm.constraint names features of nodes: `sinfo --format=%f` lists them"
    if "node" in reason.lower() or "configuration" in reason.lower():
        return "; `sinfo --Node --long` lists the nodes: compare cluster.node and --nodes"
    return ""


def states(jobs: Sequence[int]) -> dict[int, str]:
    """Those of the jobs that wait or run, and their states, as RUNNING or PENDING (BeginTime)."""
    if not jobs:
        return {}
    try:
        # Unknown jobs are an error if only one is asked for: all of the user's are asked for.
        told = call("squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%r").stdout
    except UserError:
        return {}
    found = {}
    for line in told.splitlines():
        number, state, reason = line.split("|", 2)
        if re.fullmatch(r"\d+", number) and int(number) in jobs and state in ALIVE:
            found[int(number)] = f"{state} ({reason})" if state == "PENDING" else state
    return found


ALIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SIGNALING",
    "STAGE_OUT",
)
