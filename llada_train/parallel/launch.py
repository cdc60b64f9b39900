"""A process's place among the others, and `--processes N`: start N local ones and look after them. Imports no torch.

torchrun does not pass a worker's own exit code on, and a run that was told to stop says so by its exit code; so the
few lines that start local processes are ours.
"""

import ctypes
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import FrameType

from llada_train.config.errors import UserError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2  # <sys/prctl.h>
HUNG_EXIT_CODE = 70  # EX_SOFTWARE: a rank made no progress for training.hang_timeout_seconds and told its stacks
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, a checkpoint is saved; the same command goes on from it


def adopt_place() -> None:
    """A task of a SLURM step of several gets torchrun's variables, which all else reads, unless a launcher set them.

    A batch script, and a shell that salloc or srun opened, is no such task, although SLURM's variables are set there.
    MASTER_ADDR and MASTER_PORT come from the job's script.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    in_a_step = os.environ.get("SLURM_STEP_ID", "none").isdecimal() and "MASTER_ADDR" in os.environ
    if "WORLD_SIZE" not in os.environ and in_a_step and int(tasks) > 1:
        place = {"RANK": os.environ["SLURM_PROCID"], "LOCAL_RANK": os.environ["SLURM_LOCALID"], "WORLD_SIZE": tasks}
        os.environ.update(place)


def world_size() -> int:
    """Processes of this run, as torchrun, `launch_local` or `adopt_place` say; 1 when started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def free_port() -> int:
    """A port that nobody uses, below those that Linux hands out to outgoing connections: none takes it meanwhile."""
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise UserError("none of 100 ports between 10000 and 32767 is free on this machine; stop what holds them")


def launch_local(processes: int, command: Sequence[str]) -> int:
    """Run `command` N times with torchrun's environment variables; return the first non-zero exit code, or 0.

    SIGTERM, SIGUSR1 and Ctrl-C go on to every process. When one fails the others get SIGTERM, and after a grace time
    SIGKILL; when this process is killed, all end (see `outlive_launcher`). None is left behind. A process that ends by
    a signal which was passed on, since it does not listen yet, is stopped and has not failed.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared.setdefault("OMP_NUM_THREADS", str(threads))
    workers: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []  # signals that came; those before the last worker was started reach it then

    def forward(number: int, _: FrameType | None = None) -> None:
        asked.append(number)
        if len(workers) == processes:
            _send(workers, number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for rank in range(processes):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C reaches the workers once, through `forward`.
            workers.append(
                subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=partial(_die_with, os.getpid()))
            )
        for number in list(asked):
            _send(workers, number)
        return _wait(workers, asked)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]], asked: list[int]) -> int:
    deadline = math.inf
    outcome = 0
    while True:
        codes = [worker.poll() for worker in workers]
        bad = next((code for code in codes if code not in (None, 0, STOPPED_EXIT_CODE)), 0)
        if bad and not outcome:
            deadline = time.monotonic() + GRACE_SECONDS
            outcome = bad if bad > 0 else 128 - bad  # as a shell reports a signal
            if -bad in asked:
                # It did not listen yet, so that it had not joined the others, and none of them has anything to save.
                deadline, outcome = -math.inf, STOPPED_EXIT_CODE
            _send(workers, signal.SIGTERM)
        if None not in codes:
            # A hang that one tells of may end another first.
            hung = HUNG_EXIT_CODE if HUNG_EXIT_CODE in codes else 0
            return hung or outcome or next((code for code in codes if code), 0)
        if time.monotonic() > deadline:
            _send(workers, signal.SIGKILL)
        time.sleep(0.05)


def _send(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _die_with(launcher: int) -> None:
    """Run by a worker as it starts: should the launcher be killed, Linux kills the worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the launcher's handler, which is still there
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # killed before this was set
        os._exit(1)


def outlive_launcher() -> None:
    """A worker that has joined the others may have something to save: its launcher's death asks it to stop (SIGTERM).

    Before, that kills it: a worker that remembered the signal would wait for one that had not listened and is gone.
    """
    if sys.platform == "linux":
        libc, number = ctypes.CDLL(None), ctypes.c_int()
        libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
        if number.value == signal.SIGKILL:  # started by `launch_local`
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def own_command(arguments: Sequence[str]) -> list[str]:
    """This program again, with other arguments, under the same interpreter."""
    return [sys.executable, "-m", "llada_train.cli", *arguments]
