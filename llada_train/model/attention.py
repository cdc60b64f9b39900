"""Bidirectional attention and rotary embeddings, in the slot that megatron-core calls `core_attention`.

Shapes: S positions, B rows, N query heads and G key-value heads on this rank, D head size.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

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
    cu_seqlens: Tensor | None = None  # [segments + 1] over the B·S flattened tokens; None: every row is one segment


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [S, B, 1, D] in fp32 of position_ids [B, S]: angles position·θ^(−2i/D), repeated once."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.t().unsqueeze(-1).float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to x [S, B, heads, D] in fp32; returns x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class BidirectionalAttention(torch.nn.Module):
    """softmax(QKᵀ/√D)·V within each segment, with no causal mask and no memory of size S×S."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: AttentionInputs, **__: Any
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] → [S, B, N·D]."""
        inputs = packed_seq_params
        assert inputs.cos is not None and inputs.sin is not None
        q = rotate(query, inputs.cos, inputs.sin)
        k = rotate(key, inputs.cos, inputs.sin)
        if flash_attn_varlen_func is not None and q.is_cuda and q.dtype == torch.bfloat16:
            out = _flash(q, k, value, inputs.cu_seqlens)
        elif inputs.cu_seqlens is None:
            out = _sdpa(*(x.permute(1, 2, 0, 3) for x in (q, k, value))).permute(2, 0, 1, 3)
        else:
            out = _sdpa_by_segment(q, k, value, inputs.cu_seqlens)
        return out.reshape(*out.shape[:2], -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_by_segment(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One call for each run of segments of equal length, such as uncut rows: cheaper than a masked call over all."""
    S, B = q.shape[:2]
    tokens = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    pieces, start = [], 0
    for length, segments in groupby(cu_seqlens.diff().tolist()):
        stop = start + length * len(list(segments))
        out = _sdpa(*(x[start:stop].unflatten(0, (-1, length)).transpose(1, 2) for x in tokens))
        pieces.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(pieces).reshape(B, S, *q.shape[2:]).transpose(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    S, B = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q.device)
    rows = [x.transpose(0, 1).reshape(B * S, *x.shape[2:]) for x in (q, k, v)]
    out = flash_attn_varlen_func(*rows, cu_seqlens, cu_seqlens, S, S, causal=False)
    return out.reshape(B, S, *q.shape[2:]).transpose(0, 1)
