"""What the benchmarks share: their data, and the lines that say on what machine and code they ran."""

import os
import platform
import subprocess
import sysconfig
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_data(folder: Path, files: int | None = None) -> None:
    """`tokenizer/` and `corpus.*` from some of the Python standard library's sources."""
    from data_tools.sources import Sources
    from data_tools.tokenize import tokenize
    from data_tools.train_tokenizer import train_tokenizer

    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    train_tokenizer((path.read_text(encoding="utf-8") for path in library), 2048, folder / "tokenizer")
    tokenize(Sources(library), folder / "tokenizer", folder / "corpus")


def machine_and_versions() -> str:
    """Two Markdown items: processor, cores, system, its other work; Python, engines, commit."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "deepspeed"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    load = f", load {os.getloadavg()[0]:.0f} when done" if hasattr(os, "getloadavg") else ""
    return f"""- {_processor()}, {os.cpu_count()} cores, {platform.system()}{load}
- Python {platform.python_version()}, {versions}; commit {commit.stdout.strip() or "unknown"}"""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
