"""Bidirectional attention and rotary embeddings, in the slot that megatron-core calls `core_attention`.

Under context parallelism each rank has the queries, keys and values of its own columns and gathers the others' keys and
values: with no causal mask, equal slices are equal work.

Shapes: S positions, B rows, N query heads and G key-value heads on this rank, D head size; S' positions of whole rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from llada_train.data.batch import Segments
from llada_train.model.kernels import Kernels

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # an optional extra; torch's own attention does the same work
    flash_attn_varlen_func = None


@dataclass
class AttentionInputs(PackedSeqParams):
    """What attention needs of a batch besides hidden states; it travels through megatron-core's layers untouched."""

    qkv_format: str = "sbhd"
    cos: Tensor | None = None  # [S, B, 1, D] fp32
    sin: Tensor | None = None  # [S, B, 1, D] fp32
    segments: Segments | None = None  # None: every row is one segment


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [S, B, 1, D] in fp32 of position_ids [B, S]: angles position·θ^(−2i/D), repeated once."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.t().unsqueeze(-1).float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


class BidirectionalAttention(torch.nn.Module):
    """softmax(QKᵀ/√D)·V within each segment, with no causal mask and no memory of size S×S."""

    def __init__(self, config: TransformerConfig, kernels: Kernels, **_: Any) -> None:
        super().__init__()
        self._rotate = kernels.rotate

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: AttentionInputs, **__: Any
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] → [S, B, N·D]."""
        inputs = packed_seq_params
        assert inputs.cos is not None and inputs.sin is not None
        q, k = self._rotate(query, key, inputs.cos, inputs.sin)
        k, v = _of_whole_rows(k, value)
        if flash_attn_varlen_func is not None and q.is_cuda and q.dtype == torch.bfloat16:
            out = _flash(q, k, v, inputs.segments)
        elif inputs.segments is None:
            out = _sdpa(*(x.permute(1, 2, 0, 3) for x in (q, k, v))).permute(2, 0, 1, 3)
        else:
            out = _sdpa_by_segment(q, k, v, inputs.segments.lengths)
        return out.reshape(*out.shape[:2], -1)


def _of_whole_rows(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [S, B, G, D] of this rank's columns → [S', B, G, D] of all; backward sums their gradients."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return key, value
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    k, v = both.chunk(2, dim=-1)
    return k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_by_segment(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[tuple[int, int]]) -> Tensor:
    """One call for each run of segments of equal lengths, such as uncut rows: cheaper than a masked call over all."""
    S, B = q.shape[:2]
    queries, keys, values = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    pieces, q_start, kv_start = [], 0, 0
    for (q_length, kv_length), run in groupby(lengths):
        count = len(list(run))
        q_stop, kv_stop = q_start + q_length * count, kv_start + kv_length * count
        if q_length:
            out = _sdpa(
                queries[q_start:q_stop].unflatten(0, (count, q_length)).transpose(1, 2),
                keys[kv_start:kv_stop].unflatten(0, (count, kv_length)).transpose(1, 2),
                values[kv_start:kv_stop].unflatten(0, (count, kv_length)).transpose(1, 2),
            )
            pieces.append(out.transpose(1, 2).flatten(0, 1))
        q_start, kv_start = q_stop, kv_stop
    return torch.cat(pieces).reshape(B, S, *q.shape[2:]).transpose(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    (S, B), whole = q.shape[:2], k.shape[0]
    if segments is None:
        rows = torch.arange(B + 1, dtype=torch.int32, device=q.device)
        cu_seqlens_q, cu_seqlens_kv = rows * S, rows * whole
    else:
        cu_seqlens_q, cu_seqlens_kv = segments.cu_seqlens_q, segments.cu_seqlens_kv
    tokens = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    out = flash_attn_varlen_func(
        *tokens,
        cu_seqlens_q,
        cu_seqlens_kv,
        S,
        whole,
        causal=False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.reshape(B, S, *q.shape[2:]).transpose(0, 1)
