"""The images cannot be built without docker: their files are linted, and their pins resolved by the registry."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
DOCKERFILES = {path.name: path.read_text() for path in sorted((ROOT / "docker").glob("Dockerfile*"))}
UNREACHABLE = ("error sending request", "Failed to fetch", "dns error", "operation timed out")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Of constraints.txt; each package once, exactly."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {canonicalize_name(name): version for name, version in found.items()}


def test_dockerfiles_are_clean() -> None:
    files = [ROOT / "docker" / name for name in DOCKERFILES]
    done = subprocess.run(
        [BIN / "hadolint", "--config", ROOT / ".hadolint.yaml", *files], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dockerfiles_agree_with_the_pins(pins: dict[str, str]) -> None:
    cuda = set(re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.", DOCKERFILES["Dockerfile"], re.M))
    assert cuda == {".".join(pins["cuda-toolkit"].split(".")[:2])}  # flash-attn is compiled with the CUDA of torch
    assert re.findall(r"/uv:(\S+)", DOCKERFILES["Dockerfile"]) == [pins["uv"]]
    pythons = re.findall(r"python:(\d\.\d+)|--python (\d\.\d+)", "".join(DOCKERFILES.values()))
    assert {one or other for one, other in pythons} == {"3.11"}
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    folder = ROOT / ".devcontainer"
    assert (folder / container["build"]["dockerfile"]).resolve() == ROOT / "docker" / "Dockerfile.cpu"
    assert f"AS {container['build']['target']}\n" in DOCKERFILES["Dockerfile.cpu"]


@pytest.mark.parametrize("extras", [("gpu", "gpu-build"), ("dev", "s3")], ids="-".join)
def test_pins_exist_and_resolve_together(pins: dict[str, str], extras: tuple[str, ...]) -> None:
    """For CUDA nodes and for development: nothing is needed that has no pin, and no pin is in another's way."""
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    bare = ["--no-config", "--quiet", "--no-header", "--no-annotate"]
    chosen = [f"--extra={extra}" for extra in extras]
    inputs = ["--constraint", ROOT / "constraints.txt", *chosen, ROOT / "pyproject.toml"]
    done = subprocess.run(
        [BIN / "uv", "pip", "compile", *bare, *platform, *inputs], capture_output=True, text=True, timeout=300
    )
    if any(sign in done.stderr for sign in UNREACHABLE):
        pytest.skip(f"the registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    needed = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, done.stdout.splitlines())}
    assert len(needed) > 50
    assert needed == {name: f"=={pins.get(name)}" for name in needed}
