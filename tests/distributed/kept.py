"""What autograd keeps for backward, counted storage by storage."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    """A tensor that lives as long as the node of the graph that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Storages that a graph keeps, but for those of `parameters`."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def during(self, forward: Callable[[], Any]) -> Any:
        def pack(tensor: Tensor) -> _Saved:
            saved = _Saved(tensor)
            self._saved.add(saved)
            return saved

        with saved_tensors_hooks(pack, lambda saved: saved.tensor):
            return forward()

    def storages(self) -> dict[int, int]:
        """Bytes of each storage that is kept now."""
        found = {}
        for saved in list(self._saved):
            storage = saved.tensor.untyped_storage()
            if storage._cdata not in self._parameters:
                found[storage._cdata] = storage.nbytes()
        return found

    @property
    def bytes(self) -> int:
        return sum(self.storages().values())

    def describe(self) -> str:
        seen = {}
        for saved in list(self._saved):
            t = saved.tensor
            seen[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), tuple(t.shape), t.dtype)
        return "\n".join(str(v) for v in sorted(seen.values(), key=lambda v: -v[0]))


def fused_rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return FusedRMSNorm.apply(x, weight, eps)


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel keeps: input, weight, and a factor for each row (derivatives.yaml, _fused_rms_norm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, factor)
        return (x.float() * factor).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, factor = ctx.saved_tensors
        return gradient * weight * factor.to(x.dtype), (gradient * x).flatten(0, -2).sum(0), None
