"""Bytes of one GPU by cause, at the worst moment of a step: every token masked, all micro-batches in flight.

H hidden size, F feed-forward, D head size, N query heads, G key-value heads, V padded vocabulary, S sequence length;
T tokens of a micro-batch on this rank, T' those whose hidden states it holds; e bytes of an element.
"""

import math
from dataclasses import dataclass

from llada_train.plan.layout import Holding, Layout, padded

FP32 = 4
MASTER_AND_MOMENTS = 3 * FP32
MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default for `stage3_max_live_parameters` and `…_max_reuse_distance`
# Not counted by any formula: CUDA's context, NCCL's and cuBLAS's buffers, what the allocator cannot use. An assumption.
RESERVE = 3 * 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes. The sum is the most that a GPU holds at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int  # beyond the logits: buckets, a gradient on its way, a layer's temporaries; and the reserve
    host: int = 0  # of the CPUs' memory, for each GPU

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.workspace


def memory(layout: Layout, fused_norm: bool = True) -> list[Memory]:
    """Of each pipeline rank; `fused_norm`: as CUDA's kernel is (`kept_by_norm`)."""
    return [_memory(layout, rank, holding, fused_norm) for rank, holding in enumerate(layout.holdings)]


def _memory(layout: Layout, rank: int, holding: Holding, fused_norm: bool) -> Memory:
    weights, gradients, optimizer = state(layout, holding)
    logits = logits_at_peak(layout) if holding.has_head else 0
    host, parallel = 0, layout.config.parallel
    if parallel.offload_optimizer:
        host, optimizer = offloaded(optimizer), 0
        gradients = gradients if parallel.zero_stage == 2 else 0
    kept, passing = zero_buffers(layout, holding)
    passing = max(passing, within_a_layer(layout, fused_norm))
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations(layout, rank, fused_norm),
        logits=logits,
        workspace=kept + gathered_sequence(layout) + max(0, passing - logits) + RESERVE,
        host=host,
    )


# --- what lasts


def state(layout: Layout, holding: Holding) -> tuple[int, int, int]:
    """Weights, gradients, and master and moments, where gradients are complete (ZeRO, arXiv 1910.02054, §3, §5).

    - bf16, ZeRO 1 (bf16_optimizer.py): gradients of all its parameters in one fp32 buffer that is never freed.
    - ZeRO 2 (zero/stage_1_and_2.py): fp32 gradients of its own part.
    - ZeRO 3 (zero/stage3.py): each tensor in parts, rounded up; norms stay whole besides.
    """
    e, ranks = layout.element_bytes, layout.copies
    stage = layout.config.parallel.zero_stage
    if stage == 3:
        own = sum(math.ceil(elements / ranks) for group in holding.groups for elements in group)
        norms = ranks * sum(math.ceil(elements / ranks) for elements in holding.norms)
        weights, gradients = e * (own + norms), FP32 * own
    else:
        # fp32 weights are given to the optimizer as they are, bf16 ones in flat groups; both have the groups' padding.
        whole = sum(padded(sum(group), ranks) for group in holding.groups if group)
        own = whole // ranks
        weights, gradients = e * whole, FP32 * (own if stage == 2 else whole)
    return weights, gradients, MASTER_AND_MOMENTS * own


def offloaded(optimizer: int) -> int:
    """In host memory for each GPU: master, moments, the master's gradient, and with ZeRO 2 a copy in bf16.

    ZeRO 2 adds gradients up on the GPU, and copies them when they are complete; ZeRO 3 adds them up on the host.
    """
    return optimizer + optimizer // MASTER_AND_MOMENTS * (FP32 + 2)


# --- activations


def activations(layout: Layout, rank: int, fused_norm: bool = True) -> int:
    """Kept for backward by a pipeline rank, of all its micro-batches in flight, before the head's own."""
    holding, e = layout.holdings[rank], layout.element_bytes
    hidden = e * layout.residual_tokens * layout.config.model.hidden_size
    layer, total = kept_by_layer(layout, fused_norm), 0
    for layers in layout.chunks_in_flight(rank):
        total += layers * layer + rotary_tables(layout)
        if len(layout.holdings) > 1:
            total += hidden  # its output, which megatron-core holds until the gradient comes
    if holding.has_head:
        total += kept_by_norm(layout, fused_norm) + masked_rows(layout)
    return total


def kept_by_layer(layout: Layout, fused_norm: bool = True, recompute: str | None = None) -> int:
    """Kept by one layer of one micro-batch, read off the layer: what each operation saves, each storage once.

    - full: the layer's input.
    - else, at T' tokens: the norms' inputs (the residual stream), and, unless they are made again, their results.
      At T tokens: queries and keys before and after rotation and values, attention's result and log-normalisers; gate
      and up of SwiGLU and, unless it is made again, their product.
    - Under context parallelism the gathered keys and values of all S in place of the rank's own.
    torch's attention keeps the values as a view of what the projection made, queries and keys in it; flash-attn copies
    them if there is more than one row, and keeps less.
    """
    config, e = layout.config, layout.element_bytes
    model, tp, cp = config.model, config.parallel.tensor_parallel, config.parallel.context_parallel
    recompute = config.training.recompute if recompute is None else recompute
    T, residual = layout.tokens, layout.residual_tokens
    if recompute == "full":
        return e * residual * model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # The projection's result and rotated keys, or those gathered; then rotated queries and attention's result.
    attention = (queries + 2 * keys + keys if cp == 1 else cp * 2 * keys) + 2 * queries
    product = model.ffn_hidden_size if recompute == "none" else 0
    at_all = e * (attention + 2 * model.ffn_hidden_size + product) + FP32 * model.num_heads
    norm = kept_by_norm(layout, fused_norm) + e * residual * model.hidden_size  # and its result
    if recompute == "selective":
        norm = e * residual * model.hidden_size  # the input alone
    return T * at_all // tp + 2 * norm


def kept_by_norm(layout: Layout, fused: bool) -> int:
    """CUDA's kernel keeps its input and a factor for each token; the CPU's operations two fp32 copies of the input."""
    e, residual, H = layout.element_bytes, layout.residual_tokens, layout.config.model.hidden_size
    return residual * (H * (e if fused else 2 * FP32) + FP32)


def rotary_tables(layout: Layout) -> int:
    """cos and sin, fp32, once for all layers of a chunk."""
    return 2 * FP32 * layout.tokens * layout.config.model.head_dim


def masked_rows(layout: Layout) -> int:
    """The head's input, every position of which is masked."""
    return layout.element_bytes * layout.masked_positions * layout.config.model.hidden_size


def logits_kept(layout: Layout) -> int:
    """The fp32 softmax of every position, which the head keeps for backward if it is made in one piece."""
    return 0 if layout.head_pieces > 1 else FP32 * layout.logits_at_once


def logits_at_peak(layout: Layout) -> int:
    """While the head makes them, and the gradients of its input and weights (llada_train/model/head.py).

    In one piece: fp32 beside those of the model's precision, or beside their gradient and the weights', twice. In
    pieces: the piece before is still there, as fp32 and as a gradient; the weights' gradient is summed up in fp32.
    """
    e, at_once = layout.element_bytes, layout.logits_at_once
    weight = layout.config.model.hidden_size * layout.head_rows
    if layout.head_pieces == 1:
        return (FP32 + e) * at_once + 2 * e * weight
    return 2 * (FP32 + e) * at_once + FP32 * weight


def gathered_sequence(layout: Layout) -> int:
    """megatron-core's one buffer for inputs that sequence parallelism gathers, which it never frees."""
    gathers = layout.config.parallel.sequence_parallel
    return layout.element_bytes * layout.tokens * layout.config.model.hidden_size if gathers else 0


def within_a_layer(layout: Layout, fused_norm: bool = True) -> int:
    """What one layer's backward pass needs besides: what it makes again, and its largest temporaries.

    Those are SwiGLU's: five of T·F (the product's gradient, gate's, up's, and both together), and the residual
    stream's gradient twice.
    """
    config, e = layout.config, layout.element_bytes
    again = kept_by_layer(layout, fused_norm, recompute="none") - kept_by_layer(layout, fused_norm)
    wide = layout.tokens * config.model.ffn_hidden_size // config.parallel.tensor_parallel
    return again + e * (5 * wide + 2 * layout.residual_tokens * config.model.hidden_size)


# --- buffers of ZeRO


def zero_buffers(layout: Layout, holding: Holding) -> tuple[int, int]:
    """What ZeRO holds all through backward, and beyond that while the largest tensor's gradient is on its way.

    - ZeRO 1 in bf16: its gradient, and an fp32 copy, which is added to the buffer.
    - ZeRO 2: buckets of the model's precision, two if they overlap; of a tensor larger than a bucket its gradient,
      a flat copy, and an fp32 copy, which is sent.
    - ZeRO 3: an fp32 bucket; the gathered weights, up to `stage3_max_live_parameters`; gradient, fp32 copy and its
      rearrangement by rank.
    With ZeRO 2 an optimizer that is offloaded takes a buffer for its largest gradient on the GPU besides.
    """
    e, parallel = layout.element_bytes, layout.config.parallel
    stage, bucket, largest = parallel.zero_stage, parallel.reduce_bucket_size, holding.largest
    offload = e * largest if parallel.offload_optimizer and stage == 2 else 0
    if stage == 1:
        return 0, (e + FP32) * largest if e < FP32 else e * largest
    if stage == 2:
        overlaps = parallel.overlaps_reduction
        at_once = largest if overlaps else min(largest, bucket + holding.parameters // layout.copies)
        return e * bucket * (2 if overlaps else 1) + offload, e * largest + (e + FP32) * at_once
    gathered = min(holding.parameters, MAX_LIVE_PARAMETERS)
    return FP32 * bucket + e * gathered, (e + 2 * FP32) * largest
