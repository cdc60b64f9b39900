"""What a layer computes between its matrix products, by what fuses it: torch's own kernels, torch.compile, or Liger.

All are the same functions of the same tensors, within rounding; none changes a shape, a gradient or what a checkpoint
holds. Shapes: H hidden size, F feed-forward; S positions, B rows, D head size.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_train.config.errors import UserError


@dataclass(frozen=True)
class Kernels:
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """x […, H], weight [H], eps → x / √(mean(x²) + eps) · weight."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """query and key [S, B, heads, D], cos and sin [S, B, 1, D] fp32 → both, rotated in fp32; may write into them."""
    swiglu: Callable[[Tensor], Tensor]
    """[…, 2F] (gate, up) → silu(gate) · up […, F]."""


def kernels(name: str, device: torch.device) -> Kernels:
    """Those of `training.kernels`.

    `auto` is torch.compile on a GPU where it can work, else torch: on CPUs compiling takes longer than a small run.

    Raises:
        UserError: they cannot be had on this machine.
    """
    gpu = device.type == "cuda"
    if name == "auto":
        name = "compile" if gpu and _missing("compile", gpu) is None else "torch"
    if (missing := _missing(name, gpu)) is not None:
        raise UserError(f"training.kernels: {name} needs {missing}; auto and torch work without it")
    made: dict[str, Callable[[], Kernels]] = {"torch": lambda: TORCH, "compile": _compiled, "liger": _liger}
    return made[name]()


def _missing(name: str, gpu: bool) -> str | None:
    """What it needs and this machine lacks."""
    if name == "compile":
        if gpu and find_spec("triton") is None:
            return "triton, which is not installed (pip install triton)"
        compiler = os.environ.get("CC", "gcc") if gpu else os.environ.get("CXX", "g++")  # Triton's launchers are in C
        if shutil.which(compiler) is None:
            return f"a compiler, and there is no {compiler} on PATH (apt-get install g++, or set CC and CXX)"
        header = Path(sysconfig.get_path("include"), "Python.h")  # what is compiled is called from Python
        if not header.is_file():
            return f"Python's headers, and there is no {header} (apt-get install python3-dev)"
    if name == "liger":
        if not gpu:
            return "a GPU"
        if find_spec("liger_kernel") is None:
            return "liger-kernel, which is not installed (pip install liger-kernel)"
    return None


@cache  # compiled once in a process, not once in each layer
def _compiled() -> Kernels:
    return Kernels(rms_norm=torch.compile(_rms_norm), rotate=torch.compile(_rotate_both), swiglu=torch.compile(_swiglu))


def _liger() -> Kernels:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # No offset; "llama": rounded before the weight, as the released model does; gradients not in place.
        out: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
        return out

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Liger's rows are [B, heads, S, D] of one table for each row: here a "row" is a position, and its B tokens.
        turned = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), cos.squeeze(2), sin.squeeze(2))
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    def swiglu(gate_up: Tensor) -> Tensor:
        # Its gradient has two axes, whatever its input has.
        out: Tensor = LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2))
        return out.view(*gate_up.shape[:-1], -1)

    return Kernels(rms_norm, rotate, swiglu)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class _Rotate(torch.autograd.Function):
    """As `_rotate`, but in half the passes over memory; keeps the tables alone, and turns gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    wide, half = x.float(), x.shape[-1] // 2
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:], value=direction)
    return out.to(x.dtype)


def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """As `_swiglu`, but keeps its input only, which fc1 has made anyway."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        to_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return torch.cat([to_gate, gradient * F.silu(gate)], dim=-1)


def _rotate_one_by_one(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)


TORCH = Kernels(rms_norm=_rms_norm, rotate=_rotate_one_by_one, swiglu=_SwiGLU.apply)
