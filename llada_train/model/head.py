"""The language-model head, on masked positions only, over a vocabulary that is split across tensor-parallel ranks.

The loss needs two numbers for each masked position: the log-normaliser log Σ_v exp(logit_v) and the target's logit.
Both are computed in fp32, from logits of the model's precision. Shapes: K masked positions, V vocabulary rows on this
rank, hidden size H.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from llada_train.data.batch import Batch
from llada_train.model.sizes import CHUNK


class _LogNormaliserAndTarget(torch.autograd.Function):
    """rows [K, H], weight [V, H] (this rank's), targets [K] (global ids) → [2, K] fp32: log-normaliser, target logit.

    If the logits [K, V] are more than CHUNK, they are made in pieces, and once more in backward: with every token
    masked they would be the largest tensor of a step by far.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        V = len(weight)
        local = targets - parallel_state.get_tensor_model_parallel_rank() * V
        here = (local >= 0) & (local < V)
        local = local.clamp(0, V - 1).unsqueeze(1)
        size = max(1, CHUNK // V)
        ctx.pieces = [slice(start, start + size) for start in range(0, len(rows), size)]
        told = torch.empty(2, len(rows), device=rows.device)
        kept = None
        for at in ctx.pieces:
            logits = rows[at] @ weight.t()
            highest = logits.max(dim=1).values.float()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            scores = logits - highest.unsqueeze(1)  # fp32; from here on in place
            target = torch.where(here[at], scores.gather(1, local[at]).squeeze(1), 0.0)
            softmax = scores.exp_()
            sums = torch.stack([softmax.sum(dim=1), target])
            dist.all_reduce(sums, group=group)
            told[:, at] = torch.stack([sums[0].log(), sums[1]]) + highest
            if len(ctx.pieces) == 1:  # kept, so that it need not be made again
                kept = softmax.div_(sums[0].unsqueeze(1))
        ctx.save_for_backward(rows, weight, local, here, told, kept)  # an attribute of ctx would outlive backward
        return told

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, local, here, told, kept = ctx.saved_tensors
        to_normaliser, to_target = gradient[0], torch.where(here, gradient[1], 0.0)
        to_rows = torch.empty_like(rows)
        to_weight = torch.zeros_like(weight, dtype=weight.dtype if kept is not None else torch.float32)
        for at in ctx.pieces:
            softmax = kept
            if softmax is None:
                softmax = (rows[at] @ weight.t() - told[0, at].unsqueeze(1)).exp_()
            scores = softmax.mul_(to_normaliser[at].unsqueeze(1))
            to_logits = scores.scatter_add_(1, local[at], to_target[at].unsqueeze(1)).to(weight.dtype)
            torch.mm(to_logits, weight, out=to_rows[at])
            to_weight += to_logits.t() @ rows[at]
        return to_rows, to_weight.to(weight.dtype), None


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
        """hidden [S, B, H] (a slice of S under sequence parallelism) → [2, K] fp32: log-normaliser, target logit.

        Without targets: the rows [K, H] themselves, to make `logits` of.
        """
        B, S = batch.input_ids.shape
        # Position b·S + s of the batch stands at s·B + b in megatron-core's sequence-first layout.
        index = batch.masked_positions % S * B + batch.masked_positions // S
        if self.sequence_parallel:
            # The gather's backward is a reduce-scatter: the one place where the input gradient is summed over TP.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
            rows = hidden.reshape(S * B, -1).index_select(0, index)
        else:
            rows = copy_to_tensor_model_parallel_region(hidden.reshape(S * B, -1).index_select(0, index))
        if batch.targets is None:
            return rows
        told: Tensor = _LogNormaliserAndTarget.apply(rows, self.weight, batch.targets)
        return told

    def logits(self, rows: Tensor) -> Tensor:
        """rows [K, H] → [K, V] over the whole vocabulary, on every rank of it; no gradients."""
        logits: Tensor = gather_from_tensor_model_parallel_region(rows @ self.weight.t())
        return logits
