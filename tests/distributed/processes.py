"""Runs a function in N processes that form a process group.

One process that stays up has imported everything; each run forks its N processes from it. So a run starts at once, no
state of one run reaches the next, and a run that fails or hangs takes nothing with it.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from llada_train.parallel.launch import free_port

Result = TypeVar("Result")

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["training_run"])


def start() -> None:
    """Start the process that forks, if it does not run yet; it takes seconds to import everything."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):  # where it finds what to import
        forkserver.ensure_running()


def run(processes: int, function: Callable[..., Result], *arguments: Any, timeout: float = 300) -> list[Result]:
    """`function(*arguments)` on each rank: the results by rank. The function is a module's own, found by name.

    Raises:
        RuntimeError: a rank raised something (its traceback is in the message), died, or took too long.
    """
    start()
    port, deadline = free_port(), time.monotonic() + timeout
    workers, connections = [], []
    try:
        for rank in range(processes):
            ours, theirs = _FORK.Pipe(duplex=False)
            worker = _FORK.Process(target=_work, args=(theirs, rank, processes, port, function, arguments), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            connections.append(ours)
        results: dict[int, Result] = {}
        while len(results) < processes:
            waiting = {connections[rank]: rank for rank in range(processes) if rank not in results}
            ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} did not finish in {timeout} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    good, value = connection.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if not good:
                    raise RuntimeError(f"rank {rank} of {processes}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(processes)]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _work(
    connection: Connection, rank: int, processes: int, port: int, function: Callable[..., Any], arguments: tuple[Any]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        connection.send((True, function(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
