"""The language-model head, on masked positions only, over a vocabulary that is split across tensor-parallel ranks.

The loss needs two numbers for each masked position: the log-normaliser log Σ_v exp(logit_v) and the target's logit.
Both are computed in fp32, from logits of the model's precision. Shapes: K masked positions, V vocabulary rows on this
rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from llada_train.data.batch import Batch


class _LogNormaliserAndTarget(torch.autograd.Function):
    """logits [K, V] (this rank's rows), targets [K] (global ids) → [2, K] fp32: log-normaliser, target logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        rows = logits.shape[1]
        highest = logits.max(dim=1).values.float()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        scores = logits - highest.unsqueeze(1)  # fp32; from here on in place: K·V is the largest tensor of the step
        local = targets - parallel_state.get_tensor_model_parallel_rank() * rows
        here = (local >= 0) & (local < rows)
        local = local.clamp(0, rows - 1).unsqueeze(1)
        target = torch.where(here, scores.gather(1, local).squeeze(1), 0.0)
        softmax = scores.exp_()
        sums = torch.stack([softmax.sum(dim=1), target])
        dist.all_reduce(sums, group=group)
        softmax.div_(sums[0].unsqueeze(1))
        ctx.save_for_backward(softmax, local, here)
        ctx.dtype = logits.dtype
        return torch.stack([sums[0].log(), sums[1]]) + highest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        softmax, local, here = ctx.saved_tensors
        to_normaliser, to_target = gradient
        grad = softmax.mul_(to_normaliser.unsqueeze(1))
        grad.scatter_add_(1, local, torch.where(here, to_target, 0.0).unsqueeze(1))
        return grad.to(ctx.dtype), None


class MaskedHead(torch.nn.Module):
    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        rows = vocab_size // config.tensor_model_parallel_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(rows, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """hidden [S, B, H] (a slice of S under sequence parallelism) → [2, K] fp32: log-normaliser, target logit."""
        B, S = batch.input_ids.shape
        # Position b·S + s of the batch stands at s·B + b in megatron-core's sequence-first layout.
        index = batch.masked_positions % S * B + batch.masked_positions // S
        if self.sequence_parallel:
            # The gather's backward is a reduce-scatter: the one place where the input gradient is summed over TP.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
            rows = hidden.reshape(S * B, -1).index_select(0, index)
        else:
            rows = copy_to_tensor_model_parallel_region(hidden.reshape(S * B, -1).index_select(0, index))
        return _LogNormaliserAndTarget.apply(rows @ self.weight.t(), batch.targets)
