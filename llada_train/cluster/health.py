"""Is a node fit to train? What each node measures of itself, and who is at fault when all reports are together.

`measure` runs on every node before a run starts there, minutes at most. What needs a GPU is in gpu_health, which needs
torch; all else answers at once.
"""

import faulthandler
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

import numpy as np

from llada_train.config.cluster import ClusterConfig, HealthConfig

PACKAGES = ("llada-train", "torch", "megatron-core", "deepspeed", "numpy")
LINKS_FILE = "links.json"
DISK_BYTES = 1 << 26
MIN_NODES_TO_COMPARE = 3  # of two, nobody can say which one is slow


@dataclass
class Report:
    """One node's own. Rates of which each GPU has one are compared between nodes; CPU rates are only told."""

    node: str
    facts: dict[str, float | str] = field(default_factory=dict)  # "disk, MB/s": 812.0
    per_gpu: dict[str, list[float]] = field(default_factory=dict)  # "matmul, TFLOP/s": one value for each GPU
    versions: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Links:
    """GB/s between pairs of nodes, and of one reduction over all processes."""

    pairs: list[tuple[str, str, float]]
    all_reduce: float


def measure(cluster: ClusterConfig, output: Path | None = None) -> Report:
    """Look at this node; with `output`, a shared folder, the report is also written there.

    A check that hangs (a dead disk, a lost GPU) is named when the time is over, and ends the process.
    """
    report = Report(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    doing = ["starting"]

    def too_late(number: int, frame: FrameType | None) -> None:
        report.problems.append(f"{doing[0]}: not done after {cluster.health.timeout_seconds} s")
        _write(report, output)
        os._exit(1)

    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(cluster.health.timeout_seconds)
    # Where even Python's signals do not get through: the stacks, and the end.
    faulthandler.dump_traceback_later(cluster.health.timeout_seconds + 10, exit=True)
    checks: list[tuple[str, Callable[[Report, ClusterConfig], None]]] = [
        ("versions", _versions),
        ("local disk", _disk),
        ("clock", lambda r, c: _clock(r, c, output)),
        ("CPU", _cpu),
    ]
    if cluster.node.gpus:
        try:
            from llada_train.cluster.gpu_health import GPU_CHECKS

            checks += GPU_CHECKS
        except Exception as error:  # a torch whose libraries are missing, for one
            report.problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
    for name, check in checks:
        doing[0] = name
        try:
            check(report, cluster)
        except Exception as error:  # whatever it is, the node is at fault and the others want to know
            report.problems.append(f"{name}: {type(error).__name__}: {error}")
    signal.alarm(0)
    faulthandler.cancel_dump_traceback_later()
    _write(report, output)
    return report


def _write(report: Report, output: Path | None) -> None:
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f"{report.node}.tmp"
    temporary.write_text(json.dumps(asdict(report)), encoding="utf-8")
    temporary.replace(output / f"{report.node}.json")


def _versions(report: Report, cluster: ClusterConfig) -> None:
    report.versions["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            report.versions[package] = version(package)
        except PackageNotFoundError:
            report.problems.append(f"{package} is not installed")


def _disk(report: Report, cluster: ClusterConfig) -> None:
    """Write, flush and read on the node's own disk."""
    folder, limits = cluster.local_scratch, cluster.health
    try:
        cluster.scratch.mkdir(mode=0o700, exist_ok=True)
        if cluster.scratch.stat().st_uid != os.getuid():  # its name can be guessed, in a folder where all may write
            report.problems.append(f"local disk: {cluster.scratch} belongs to somebody else, and is not used")
        free = shutil.disk_usage(folder).free / 1e9
        file = folder / f".llada-train-health-{os.getpid()}"
        try:
            content = os.urandom(1 << 20)
            began = time.perf_counter()
            with file.open("wb") as out:
                for _ in range(DISK_BYTES // len(content)):
                    out.write(content)
                out.flush()
                os.fsync(out.fileno())
            rate = DISK_BYTES / (time.perf_counter() - began) / 1e6
            if file.read_bytes()[-len(content) :] != content:
                report.problems.append(f"local disk {folder}: reads other bytes than were written")
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        report.problems.append(f"local disk {folder}: {error.strerror}")
        return
    report.facts |= {"disk, MB/s": round(rate), "disk free, GB": round(free, 1)}
    if free < limits.min_free_disk_gb:
        report.problems.append(f"local disk {folder}: {free:.1f} GB free, {limits.min_free_disk_gb} are needed")
    if limits.min_disk_mb_per_second is not None and rate < limits.min_disk_mb_per_second:
        report.problems.append(f"local disk {folder}: {rate:.0f} MB/s, below {limits.min_disk_mb_per_second}")


def _clock(report: Report, cluster: ClusterConfig, output: Path | None) -> None:
    """Against the clock that the shared file system puts on a new file: the same for all nodes."""
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{report.node}.clock"
    file.write_bytes(b"")
    skew = time.time() - file.stat().st_mtime
    file.unlink()
    report.facts["clock skew, s"] = round(skew, 2)
    if abs(skew) > cluster.health.max_clock_skew_seconds:
        report.problems.append(f"clock: {skew:+.1f} s against the shared file system")


def _cpu(report: Report, cluster: ClusterConfig) -> None:
    """Matrix products and copies, the best of three."""
    matrix, size = np.ones((1024, 1024), dtype=np.float32), 1 << 26
    source, target = np.zeros(size, dtype=np.uint8), np.empty(size, dtype=np.uint8)
    product, copy = _best(lambda: matrix @ matrix), _best(lambda: np.copyto(target, source))
    report.facts["CPU matmul, GFLOP/s"] = round(2 * 1024**3 / product / 1e9)
    report.facts["CPU copy, GB/s"] = round(2 * size / copy / 1e9, 1)
    report.facts["CPUs"] = len(os.sched_getaffinity(0))


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def read_reports(folder: Path) -> dict[str, Report]:
    """By node."""
    files = [file for file in folder.glob("*.json") if file.name != LINKS_FILE]
    reports = [Report(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return {report.node: report for report in reports}


def write_links(links: Links, folder: Path) -> None:
    temporary = folder / "links.tmp"
    temporary.write_text(json.dumps(asdict(links)), encoding="utf-8")
    temporary.replace(folder / LINKS_FILE)


def read_links(folder: Path) -> Links | None:
    """None: they were not measured, or the measurement failed."""
    path = folder / LINKS_FILE
    return Links(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def judge(
    reports: Mapping[str, Report], nodes: Sequence[str], limits: HealthConfig, links: Links | None = None
) -> dict[str, list[str]]:
    """The nodes at fault, each with what is wrong: by their own reports, by their silence, against the others."""
    faults: dict[str, list[str]] = {}

    def blame(node: str, problem: str) -> None:
        faults.setdefault(node, []).append(problem)

    for node in nodes:
        if node not in reports:
            blame(node, f"told nothing within {limits.timeout_seconds} s")
        for problem in reports[node].problems if node in reports else []:
            blame(node, problem)
    there = [reports[node] for node in nodes if node in reports]
    for name in dict.fromkeys(name for report in there for name in report.versions):
        # Of equally common ones the first node's, where rank 0 is.
        usual = Counter(report.versions.get(name) for report in there).most_common(1)[0][0]
        for report in there:
            if report.versions.get(name) != usual:
                blame(report.node, f"{name} {report.versions.get(name)}, but {usual} elsewhere")
    for name in dict.fromkeys(name for report in there for name in report.per_gpu):
        median = statistics.median([value for report in there for value in report.per_gpu.get(name, [])])
        for report in there:
            for gpu, value in enumerate(report.per_gpu.get(name, [])):
                if value < limits.share_of_median * median:
                    blame(report.node, f"GPU {gpu}: {name} {value:.0f}, but the median is {median:.0f}")
    if links is not None:
        _judge_links(links, limits, blame)
    return faults


def _judge_links(links: Links, limits: HealthConfig, blame: Callable[[str, str], None]) -> None:
    """A node is at fault if each of its links is slow: of a slow link the node at its other end may be the cause."""
    rates: dict[str, list[float]] = {}
    for one, other, rate in links.pairs:
        rates.setdefault(one, []).append(rate)
        rates.setdefault(other, []).append(rate)
    if len(rates) < MIN_NODES_TO_COMPARE:
        return
    median = statistics.median(rate for _, _, rate in links.pairs)
    for node, own in rates.items():
        if max(own) < limits.share_of_median * median:
            blame(node, f"network: at most {max(own):.2f} GB/s, but the median link has {median:.2f}")
