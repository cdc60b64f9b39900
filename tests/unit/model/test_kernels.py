"""The sets of kernels compute the same; a set that cannot be had is a mistake that is told."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from kernel_results import CPU, F, H, assert_equal

from llada_train.config.errors import UserError
from llada_train.model import kernels as module
from llada_train.model.kernels import TORCH, kernels


def test_torchs_are_the_formulas() -> None:
    """In bf16 each result is rounded once or twice."""
    x, weight = torch.randn(4, H).double(), torch.randn(H).double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(TORCH.rms_norm(x, weight, 1e-5), expected)
    gate_up = torch.randn(4, 2 * F).double().requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(TORCH.swiglu(gate_up), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(TORCH.swiglu, gate_up)
    assert_equal(TORCH, torch.bfloat16, 2e-2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_ones_compute_the_same() -> None:
    assert_equal(kernels("compile", CPU), torch.float32, 1e-6)


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"training\.kernels: compile needs a compiler, and there is no g\+\+ on PATH"):
        kernels("compile", CPU)
    with pytest.raises(UserError, match=r"training\.kernels: liger needs a GPU; auto and torch work without it"):
        kernels("liger", CPU)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"liger-kernel, which is not installed \(pip install liger-kernel\)"):
        kernels("liger", torch.device("cuda"))
    with pytest.raises(UserError, match="triton, which is not installed"):
        kernels("compile", torch.device("cuda"))
    assert kernels("auto", torch.device("cuda")) is TORCH
    assert kernels("auto", CPU) is TORCH


def test_auto_compiles_on_a_gpu_that_has_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=rf"compile needs Python's headers, and there is no {tmp_path}/Python\.h"):
        kernels("compile", CPU)
    assert kernels("auto", torch.device("cuda")) is TORCH
    (tmp_path / "Python.h").touch()
    assert kernels("auto", torch.device("cuda")) is kernels("compile", torch.device("cuda")) is not TORCH
