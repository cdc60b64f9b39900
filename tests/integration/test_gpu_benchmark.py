"""The GPU benchmark, made small and on the CPU: the day a GPU is lent it has to run the first time."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)


def test_every_section_runs_and_is_told(
    tmp_path: Path, run_command: Callable[..., subprocess.CompletedProcess[str]], in_root: None
) -> None:
    done = run_command("benchmarks.gpu", "--tiny", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("gpu_*.json")
    told = json.loads(file.read_text())
    assert told["trial"] and told["device"] == "cpu" and not told["failures"]
    assert {"date", "versions", "command", "ceilings"} <= told.keys()
    assert list(told["sections"]) == ["ceilings", "head", "attention", "layer", "step"]
    for name, section in told["sections"].items():
        assert section["rows"] and not section["problems"], name
        assert file.with_name(f"{file.stem}_{name}.png").stat().st_size > 0
        for row in section["rows"]:
            assert "remark" not in row, (name, row)
            assert all(value > 0 for key, value in row.items() if isinstance(value, float) and key != "data wait %")
    sides = {row["layer"] for row in told["sections"]["layer"]["rows"]}
    assert sides >= {"ours, torch", "megatron-core, local", "plain"}
    # The profile knows the parts by name, and they are all of the step.
    (split,) = told["sections"]["step"]["tables"].values()
    parts = {row["cause"]: row["% of the step"] for row in split}
    assert parts.keys() >= {"attention", "matrix products", "head", "optimizer", "data", "gaps", "norms, elementwise"}
    assert all(parts[name] > 0 for name in ("attention", "matrix products", "head", "optimizer", "norms, elementwise"))
    assert sum(parts.values()) == pytest.approx(100)
    markdown = file.with_suffix(".md").read_text()
    assert "MFU = (6·N + 12·L·S·d)" in markdown and "these numbers say nothing of any GPU" in markdown
    assert "--tiny" in told["command"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    in_root: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    assert capsys.readouterr().err == (
        "error: no GPU: torch sees no CUDA device; run this on one, or with --tiny to try it out\n"
    )
    assert not (tmp_path / "out").exists()
