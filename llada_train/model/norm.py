"""RMSNorm that is right under sequence parallelism whoever reduces the gradients afterwards."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from llada_train.model.kernels import Kernels


class _SumGradientOverTensorParallel(torch.autograd.Function):
    """Identity forward; all-reduce over the tensor-parallel group backward.

    Under sequence parallelism each rank's norm sees a slice of the sequence, so its weight's gradient is a part of the
    sum. Adding the parts up inside backward hands finished gradients to any ZeRO stage.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.float()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total.to(gradient.dtype)


class RMSNorm(torch.nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight over the last axis, with the constructor that megatron-core's blocks call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, kernels: Kernels, **_: Any) -> None:
        # None is torch's default device, as for megatron-core's own layers: the CPU, or what the caller chose.
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.sequence_parallel = config.sequence_parallel
        self._rms_norm = kernels.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        weight = _SumGradientOverTensorParallel.apply(self.weight) if self.sequence_parallel else self.weight
        assert self.eps is not None
        return self._rms_norm(x, weight, self.eps)
