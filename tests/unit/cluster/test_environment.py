"""`llada-train doctor` on machines that this one is not: packages and a driver that lie before the real ones."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llada_train.cluster.environment import Finding, findings

NVIDIA_SMI = """\
#!/bin/sh
cat <<END
Driver Version                            : {driver}
CUDA Version                              : {cuda}
    Product Name                          : NVIDIA H100 80GB HBM3
    Product Name                          : NVIDIA H100 80GB HBM3
END
"""
TORCH = """\
from types import SimpleNamespace
version = SimpleNamespace(cuda="13.0")
cuda = SimpleNamespace(device_count=lambda: {gpus}, nccl=SimpleNamespace(version=lambda: (2, 29, 7)))
"""
Make = Callable[..., dict[str, Finding]]


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`on(gpus, package=source, …)`: what is found on a machine with these packages, by subject."""

    def found(
        gpus: int, driver: tuple[str, str] | None = ("580.95.05", "13.0"), **packages: tuple[str, str]
    ) -> dict[str, Finding]:
        for module, (version, source) in packages.items():
            (tmp_path / module).mkdir()
            (tmp_path / module / "__init__.py").write_text(source)
            (tmp_path / module / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
            metadata = tmp_path / f"{module}-{version}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
        (tmp_path / "bin").mkdir()
        if driver is not None:
            (tmp_path / "bin" / "nvidia-smi").write_text(NVIDIA_SMI.format(driver=driver[0], cuda=driver[1]))
            (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return {one.subject: one for one in findings(gpus)}

    return found


def test_a_sound_node(on: Make) -> None:
    found = on(2, torch=("2.13.0", TORCH.format(gpus=2)), flash_attn=("2.8.3", ""), transformer_engine=("2.20.2", ""))
    assert [one for one in found.values() if one.fault] == []
    assert found["GPUs"].found == "2 × NVIDIA H100 80GB HBM3"
    assert found["GPU driver"].found == "580.95.05, for CUDA up to 13.0"
    assert found["NCCL"].found == "2.29.7"
    assert found["attention"] == Finding("attention", "flash-attn 2.8.3")
    assert found["transformer-engine"].found == "2.20.2; not used yet"


def test_a_node_without_flash_attention_is_told_how_to_get_it(on: Make) -> None:
    attention = on(2, torch=("2.13.0", TORCH.format(gpus=2)))["attention"]
    assert attention.found == "torch's SDPA; flash-attn is not installed" and not attention.fault
    assert attention.remedy is not None and ".[gpu]" in attention.remedy


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "broken: ImportError: undefined symbol: _ZN3c10"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal 11"),
    ],
)
def test_a_broken_package_is_told(on: Make, source: str, told: str) -> None:
    found = on(2, torch=("2.13.0", TORCH.format(gpus=2)), flash_attn=("2.8.3", source))
    assert found["attention"].fault and found["attention"].found.startswith("torch's SDPA, since flash-attn 2.8.3 is")
    assert [one.subject for one in found.values() if one.fault] == ["attention"]
    assert told in found["attention"].found and "pip uninstall flash-attn" in (found["attention"].remedy or "")


def test_faults_of_a_gpu_node(on: Make) -> None:
    """An old driver, fewer GPUs than there are, another torch than is needed, a broken package that is imported."""
    found = on(
        2,
        driver=("550.54.15", "12.4"),
        torch=("2.12.0", TORCH.format(gpus=1)),
        transformer_engine=("2.20.2", "import nowhere"),
    )
    assert {one.subject for one in found.values() if one.fault} == {
        "GPU driver",
        "CUDA devices",
        "torch",
        "transformer-engine",
    }
    assert found["GPU driver"].found == "550.54.15, for CUDA up to 12.4, but torch is built for 13.0"
    assert found["CUDA devices"].found == "torch sees 1 of 2 GPUs"
    assert found["torch"].found == "2.12.0, but <2.14,>=2.13 is needed"


def test_gpus_without_their_software(on: Make) -> None:
    """This machine's torch, which knows no CUDA, and no driver."""
    found = on(1, driver=None)
    assert found["GPU driver"].fault and found["CUDA"].found == "torch is built without it"


def test_the_command_tells_this_machine(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_command("llada_train.cli", "doctor", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["problems"] == [], done.stdout
    subjects = {one["subject"]: one["found"] for one in told["environment"]}
    assert {"torch", "megatron-core", "deepspeed", "attention", "optimizer", "SLURM"} <= subjects.keys()
    assert told["node"]["facts"]["disk, MB/s"] > 0
    done = run_command("llada_train.cli", "doctor", "--output", tmp_path)  # as a job calls it
    assert done.returncode == 0 and "attention" not in done.stdout and "torch" in done.stdout
