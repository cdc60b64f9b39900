"""The network between nodes, measured with the backend that trains: NCCL on GPUs, gloo on CPUs."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llada_train.cluster.health import Links, write_links
from llada_train.config.cluster import ClusterConfig

GPU_BYTES, CPU_BYTES = 1 << 28, 1 << 22
REPEATS = 5


def measure_links(cluster: ClusterConfig, output: Path) -> None:
    """Collective over all processes of a step; rank 0 writes what it finds to the folder `output`.

    Each node exchanges with the next one, half of the pairs at a time, all its processes at once. A process that does
    not come, or hangs, raises an error after health.timeout_seconds.
    """
    device = torch.device("cpu")
    if cluster.node.gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=cluster.health.timeout_seconds))
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    ours, theirs = (torch.ones(size // 4, device=device) for _ in range(2))
    tasks = cluster.node.tasks
    count, node, local = dist.get_world_size() // tasks, dist.get_rank() // tasks, dist.get_rank() % tasks

    def exchange_with(other: int) -> None:
        operations = [
            dist.P2POp(dist.isend, ours, other * tasks + local),
            dist.P2POp(dist.irecv, theirs, other * tasks + local),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def rate(work: Callable[[], None], bytes_moved: float) -> float:
        work()
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(REPEATS):
            work()
        _synchronize(device)
        return bytes_moved * REPEATS / (time.perf_counter() - began) / 1e9

    found: dict[tuple[int, int], float] = {}
    edges = [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]
    for parity in (0, 1, 2):  # of an odd ring the last edge shares a node with the first
        turn = [e for e in edges if (2 if count % 2 and e[1] == 0 and count > 1 else e[0] % 2) == parity]
        dist.barrier()
        for one, other in turn:
            if node in (one, other):
                partner = other if node == one else one
                found[one, other] = rate(lambda partner=partner: exchange_with(partner), size * tasks)  # type: ignore[misc]
    dist.barrier()
    processes = dist.get_world_size()
    # A ring moves 2·(n − 1)/n of the buffer over each link.
    all_reduce = rate(lambda: dist.all_reduce(ours), size * 2 * (processes - 1) / processes)
    everyones: list[tuple[str, dict[tuple[int, int], float]]] = [("", {})] * processes
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    dist.all_gather_object(everyones, (name, found))
    if dist.get_rank() == 0:
        names = [everyones[i * tasks][0] for i in range(count)]
        rates: dict[tuple[int, int], float] = {}
        for _, own in everyones:
            for edge, speed in own.items():
                rates[edge] = min(speed, rates.get(edge, speed))
        pairs = [(names[one], names[other], round(speed, 3)) for (one, other), speed in sorted(rates.items())]
        write_links(Links(pairs, round(all_reduce, 3)), output)
    dist.destroy_process_group()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
