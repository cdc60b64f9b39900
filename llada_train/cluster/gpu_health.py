"""The part of a node's health check that needs GPUs and torch."""

import csv
import subprocess
import time
from collections.abc import Callable

import torch

from llada_train.cluster.health import Report
from llada_train.config.cluster import ClusterConfig

QUERY = "index,memory.used,ecc.errors.uncorrected.volatile.total,retired_pages.pending,driver_version"
IDLE_MIB = 1024  # a driver and its contexts take some hundred
SIZE, REPEATS = 8192, 20
COPY_BYTES = 1 << 30


def _as_the_driver_tells(report: Report, cluster: ClusterConfig) -> None:
    """GPUs seen and idle, without uncorrected ECC errors."""
    told = subprocess.run(
        ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if told.returncode:
        report.problems.append(f"nvidia-smi: {(told.stderr or told.stdout).strip()}")
        return
    rows = [[cell.strip() for cell in row] for row in csv.reader(told.stdout.splitlines())]
    if len(rows) != cluster.node.gpus:
        report.problems.append(f"{len(rows)} GPUs, but {cluster.node.gpus} are expected")
    for index, used, ecc, retired, driver in rows:
        report.versions["GPU driver"] = driver
        if used.isdecimal() and int(used) > IDLE_MIB:
            report.problems.append(f"GPU {index}: not idle: {used} MiB are in use")
        if ecc.isdecimal() and int(ecc) > 0:
            report.problems.append(f"GPU {index}: {ecc} uncorrected ECC errors")
        if retired == "Yes":
            report.problems.append(f"GPU {index}: memory pages wait for a reset of the GPU")


def _rates(report: Report, cluster: ClusterConfig) -> None:
    """Each GPU's bf16 matrix products and memory copies, and copies from it to the next one."""
    count = torch.cuda.device_count()
    if count != cluster.node.gpus:
        report.problems.append(f"torch sees {count} GPUs, but {cluster.node.gpus} are expected")
    limits, products, copies, peers = cluster.health, [], [], []
    for i in range(count):
        device = torch.device("cuda", i)
        matrix = torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16)
        products.append(2 * SIZE**3 / _seconds(lambda m=matrix: m @ m, device) / 1e12)  # type: ignore[misc]
        product = matrix @ matrix
        if not torch.equal(product, matrix @ matrix):
            report.problems.append(f"GPU {i}: the same matrix product twice, with different results")
        source, target = (torch.empty(COPY_BYTES, device=device, dtype=torch.uint8) for _ in range(2))
        copies.append(2 * COPY_BYTES / _seconds(lambda s=source, t=target: t.copy_(s), device) / 1e9)  # type: ignore[misc]
        if count > 1:
            other = torch.empty_like(source, device=torch.device("cuda", (i + 1) % count))
            peers.append(COPY_BYTES / _seconds(lambda s=source, o=other: o.copy_(s), device) / 1e9)  # type: ignore[misc]
        for name, rate, least in (
            ("bf16 matmul, TFLOP/s", products[-1], limits.min_matmul_tflops),
            ("memory, GB/s", copies[-1], limits.min_memory_gb_per_second),
        ):
            if least is not None and rate < least:
                report.problems.append(f"GPU {i}: {name} {rate:.0f}, below {least:.0f}")
    report.per_gpu |= {"bf16 matmul, TFLOP/s": products, "memory, GB/s": copies}
    if peers:
        report.per_gpu["copy to the next GPU, GB/s"] = peers


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, after a warm-up."""
    work()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / REPEATS


GPU_CHECKS: list[tuple[str, Callable[[Report, ClusterConfig], None]]] = [
    ("GPUs", _as_the_driver_tells),
    ("GPU rates", _rates),
]
