"""What is installed, which kernels and engines a run will use, what is missing and how to get it.

Versions are read from the packages' metadata. What can be installed and still be broken (compiled for another torch, or
without its libraries) is imported, in a process of its own.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from llada_train.cluster import slurm
from llada_train.config.errors import UserError

PROJECT = "llada-train"
PIP = "pip install -c constraints.txt"
INSTALL = f"{PIP} -e ."
INSTALL_GPU = f"{PIP} -e '.[gpu-build]', then {PIP} --no-build-isolation -e '.[gpu]'"
MODULES = {"torch": "torch", "flash-attn": "flash_attn", "transformer-engine": "transformer_engine", "apex": "apex"}
SECONDS = 120.0  # imports from a slow shared disk

# Imports one module and prints, as JSON, why it cannot be imported; of torch also what it says of the GPUs.
_PROBE = """
import importlib, json, sys
told = {"problem": None}
try:
    module = importlib.import_module(sys.argv[1])
    if sys.argv[1] == "torch" and module.version.cuda is not None:
        nccl = ".".join(map(str, module.cuda.nccl.version()))
        told |= {"cuda": module.version.cuda, "gpus": module.cuda.device_count(), "nccl": nccl}
except BaseException as error:
    told["problem"] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Finding:
    """One line. A fault keeps runs from starting here, or makes them other than they should be."""

    subject: str
    found: str
    fault: bool = False
    remedy: str | None = None  # how to get what is missing


@dataclass(frozen=True)
class _Probe:
    problems: dict[str, str | None]  # of modules that were imported; None: sound
    cuda: str | None = None  # that torch is built for; None: for none
    gpus: int = 0  # that torch sees
    nccl: str | None = None

    def sound(self, package: str) -> bool:
        return self.problems.get(MODULES[package], "not installed") is None


def findings(gpus: int) -> list[Finding]:
    """Of this machine, which has so many GPUs; takes seconds, most of them torch's import."""
    probe = _probe()
    parts: list[Callable[[], Iterator[Finding]]] = [
        lambda: _packages(probe),
        lambda: _gpus(gpus, probe),
        lambda: _kernels(probe),
        _slurm,
    ]
    return [finding for part in parts for finding in part()]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _probe() -> _Probe:
    problems: dict[str, str | None] = {}
    told: dict[str, Any] = {}
    for package, module in MODULES.items():
        if package == "torch" or _version(package) is not None:
            told |= _import(module)
            problems[module] = told.pop("problem")
    return _Probe(problems, **told)


def _import(module: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, module], capture_output=True, text=True, timeout=SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"importing it takes more than {SECONDS:.0f} s"}
    try:
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told
    except (IndexError, ValueError):
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"problem": f"importing it ended with {ended}: {done.stderr.strip()[-200:]}"}


def _requirements() -> list[str]:
    """None where the project is not installed, but runs from its checkout: then that is told."""
    try:
        return requires(PROJECT) or []
    except PackageNotFoundError:
        return [PROJECT]


def _packages(probe: _Probe) -> Iterator[Finding]:
    """Those that the project needs, each of a version that it was made for."""
    yield Finding("python", platform.python_version())
    faults = False
    for requirement in map(Requirement, _requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        found, problem = _version(name), probe.problems.get(MODULES.get(name, ""))
        if found is None:
            told = "not installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            told = f"{found}, but {requirement.specifier} is needed"
        elif problem is not None:
            told = f"{found}, broken: {problem}"
        else:
            if name in ("torch", "megatron-core", "deepspeed"):
                yield Finding(name, found)
            continue
        faults = True
        yield Finding(name, told, fault=True, remedy=INSTALL)
    if not faults:
        yield Finding("other packages", "all that are needed are there")


def _gpus(count: int, probe: _Probe) -> Iterator[Finding]:
    """Driver, CUDA and communication."""
    cuda = probe.cuda
    if count == 0:
        yield Finding("GPUs", "none: runs go on the CPU, and processes talk through gloo")
        return
    told = _nvidia_smi()
    if told is None:
        remedy = "install NVIDIA's driver, or give the container its utilities (NVIDIA_DRIVER_CAPABILITIES)"
        yield Finding("GPU driver", "nvidia-smi cannot be run", fault=True, remedy=remedy)
    else:
        yield Finding("GPUs", told.names)
        major = int(told.cuda.partition(".")[0])
        old = cuda is not None and major < int(cuda.partition(".")[0])
        yield Finding(
            "GPU driver",
            f"{told.driver}, for CUDA up to {told.cuda}" + (f", but torch is built for {cuda}" if old else ""),
            fault=old,
            remedy=f"a driver for CUDA {cuda}, or a torch built for {told.cuda}" if old else None,
        )
    if not probe.sound("torch"):
        return
    if cuda is None:
        remedy = f"pip uninstall torch, then without a CPU-only index: {INSTALL}"
        yield Finding("CUDA", "torch is built without it", fault=True, remedy=remedy)
        return
    yield Finding("CUDA", f"{cuda}, with torch")
    if probe.gpus != count:
        yield Finding("CUDA devices", f"torch sees {probe.gpus} of {count} GPUs", fault=True)
    yield Finding("NCCL", str(probe.nccl))
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield Finding("RDMA adapters", ", ".join(adapters) or "none: NCCL uses sockets between nodes")


def _kernels(probe: _Probe) -> Iterator[Finding]:
    """What of a step is done by what."""
    on_gpu = probe.gpus > 0
    flash, broken = _version("flash-attn"), probe.problems.get("flash_attn")
    if on_gpu and probe.sound("flash-attn"):
        yield Finding("attention", f"flash-attn {flash}")
    elif broken is not None:
        yield Finding(
            "attention",
            f"torch's SDPA, since flash-attn {flash} is broken: {broken}",
            fault=True,
            remedy=f"pip uninstall flash-attn; {INSTALL_GPU}",
        )
    else:
        why, remedy = ("; flash-attn is not installed", INSTALL_GPU) if on_gpu else ("", None)
        yield Finding("attention", f"torch's SDPA{why}", remedy=remedy)
    yield Finding("optimizer", "torch's fused AdamW, offloaded too; DeepSpeed's, which has to be compiled, is not used")
    ops = _deepspeed_ops()
    yield Finding("DeepSpeed's ops", f"built: {', '.join(ops) or 'none'}; none is needed")
    for package in ("transformer-engine", "apex"):
        found, problem = _version(package), probe.problems.get(MODULES[package])
        if problem is not None:  # megatron-core imports it where it is installed
            remedy = f"pip uninstall {package}"
            yield Finding(package, f"{found}, broken: {problem}", fault=True, remedy=remedy)
        else:
            yield Finding(package, f"{found}; not used yet" if found else "not installed; not needed")
    if on_gpu and not probe.sound("flash-attn"):
        compilers = [name for name in ("g++", "nvcc") if shutil.which(name) is None]
        if compilers:
            yield Finding("compilers", f"{', '.join(compilers)} not found; only flash-attn needs them to be built")


def _slurm() -> Iterator[Finding]:
    try:
        done = slurm.call("sbatch", "--version")
        yield Finding("SLURM", done.stdout.strip() or f"sbatch fails: {done.stderr.strip()[-200:]}")
    except UserError:
        yield Finding("SLURM", "no sbatch here; runs start with --processes or torchrun")


@dataclass(frozen=True)
class _Driver:
    names: str
    driver: str
    cuda: str


def _nvidia_smi() -> _Driver | None:
    try:
        told = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = re.findall(r"Product Name\s*: (.+)", told.stdout)
    driver, cuda = (re.search(rf"^{name} Version\s*: (\S+)", told.stdout, re.M) for name in ("Driver", "CUDA"))
    if told.returncode or not names or driver is None or cuda is None:
        return None
    kinds = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    return _Driver(", ".join(kinds), driver[1], cuda[1])


def _deepspeed_ops() -> list[str]:
    """Those that were compiled when it was installed."""
    return re.findall(r"'(\w+)': True", _file_of("deepspeed", "git_version_info_installed.py").partition("\n")[2])


def _file_of(package: str, name: str) -> str:
    """The text of a package's file, without importing the package; empty: it is not there."""
    spec = find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / name
        if path.exists():
            return path.read_text(encoding="utf-8")
    return ""
