"""`--processes N`: start N local processes of a command and look after them. Imports no torch.

torchrun does not pass a worker's own exit code on, and a run that was told to stop says so by its exit code; so the
few lines that start local processes are ours.
"""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from llada_train.config.errors import UserError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 10.0
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, a checkpoint is saved; the same command goes on from it


def world_size() -> int:
    """Processes of this run, as torchrun or `launch_local` say; 1 when started alone."""
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
    SIGKILL; when this process is killed, all get SIGTERM. None is left behind.
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
    early: list[int] = []  # signals that came before the last worker was started

    def forward(number: int, _: FrameType | None = None) -> None:
        if len(workers) < processes:
            early.append(number)
            return
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for rank in range(processes):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C reaches the workers once, through `forward`.
            workers.append(
                subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_stop_with_the_launcher)
            )
        for number in early:
            forward(number)
        return _wait(workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    deadline = None
    failed = 0
    while True:
        codes = [worker.poll() for worker in workers]
        bad = next((code for code in codes if code not in (None, 0, STOPPED_EXIT_CODE)), 0)
        if bad and not failed:
            failed = bad if bad > 0 else 128 - bad  # as a shell reports a signal
            deadline = time.monotonic() + GRACE_SECONDS
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
        if None not in codes:
            return failed or next((code for code in codes if code), 0)
        if deadline is not None and time.monotonic() > deadline:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(0.05)


def _stop_with_the_launcher() -> None:
    """Run by a worker as it starts: should the launcher be killed, Linux sends SIGTERM, so that it saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of <sys/prctl.h>


def own_command(arguments: Sequence[str]) -> list[str]:
    """This program again, with other arguments, under the same interpreter."""
    return [sys.executable, "-m", "llada_train.cli", *arguments]
