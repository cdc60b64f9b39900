"""How long a step takes: an estimate from data sheets and a few assumptions, by which layouts are compared.

It has been held against no GPU. A run's own MFU, where there is one, is better: `llada-train plan --mfu`.
"""

from dataclasses import dataclass

from llada_train.config.schema import ModelConfig
from llada_train.plan.chips import Chip
from llada_train.plan.flops import head_made_again, mean_masked_share
from llada_train.plan.layout import Holding, Layout, padded
from llada_train.plan.memory import FP32
from llada_train.plan.traffic import Behind, seconds, traffic

# Assumptions. Matrix products of this size reach three quarters of the peak, flash-attn on Hopper 0.4 forward and 0.35
# backward (FlashAttention-3, arXiv 2407.08608, Fig. 5 and 6, on its version 2), other operations 0.8 of memory's rate.
PRODUCTS_REACH = 0.75
ATTENTION_FORWARD_REACHES, ATTENTION_BACKWARD_REACHES = 0.4, 0.35
MEMORY_REACHES = 0.8
# Of an offloaded optimizer, for each GPU: bytes/s to and from the host, and of the host's memory as Adam moves it.
TO_HOST_RATE, HOST_MEMORY_RATE = 40e9, 25e9


@dataclass(frozen=True)
class Pass:
    """Seconds of one micro-batch on the slowest pipeline rank, forward or backward."""

    products: float = 0.0
    attention: float = 0.0
    other: float = 0.0  # bound by memory

    @property
    def total(self) -> float:
        return self.products + self.attention + self.other

    def __add__(self, more: "Pass") -> "Pass":
        return Pass(self.products + more.products, self.attention + more.attention, self.other + more.other)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause; they add up."""

    products: float
    attention: float
    other: float
    bubble: float
    exposed: dict[str, float]  # communication that hides behind nothing, by the group that it is in
    update: float
    hidden: float  # communication that does hide: no part of the sum

    @property
    def total(self) -> float:
        work = self.products + self.attention + self.other
        return work + self.bubble + sum(self.exposed.values()) + self.update


def step_time(layout: Layout, chip: Chip) -> StepTime:
    """Of the pipeline rank that takes longest."""
    return max((_step_time(layout, chip, rank) for rank in range(len(layout.holdings))), key=lambda one: one.total)


def _step_time(layout: Layout, chip: Chip, rank: int) -> StepTime:
    holding, m = layout.holdings[rank], layout.micro_batches
    forward, backward = _passes(layout, holding, chip)
    # What a collective may hide behind, seconds of the whole step that are left of it.
    room: dict[Behind, float] = {
        "nothing": 0.0,
        "forward": m * forward.total,
        "backward": m * backward.total,
        "products": m * backward.products / 2,
    }
    exposed: dict[str, float] = {}
    hidden = in_every_slot = 0.0
    for call in traffic(layout, rank):
        takes = seconds(call, layout, chip)
        covered = min(takes, room[call.behind])
        room[call.behind] -= covered
        hidden += covered
        exposed[call.group] = exposed.get(call.group, 0.0) + takes - covered
        in_every_slot += takes - covered if call.group != "copies" else 0.0
    work = forward + backward
    waiting = layout.bubble / (1 - layout.bubble)
    return StepTime(
        products=m * work.products,
        attention=m * work.attention,
        other=m * work.other,
        bubble=waiting * (m * work.total + in_every_slot),
        exposed=exposed,
        update=_update(layout, holding, chip),
        hidden=hidden,
    )


def _passes(layout: Layout, holding: Holding, chip: Chip) -> tuple[Pass, Pass]:
    """FLOPs as `plan.flops` counts them, on this rank's tokens and its share of each matrix."""
    config, model, T = layout.config, layout.config.model, layout.tokens
    tp = config.parallel.tensor_parallel
    recompute = config.training.recompute
    ends = (holding.has_embedding + holding.has_head) * model.padded_vocab_size * model.hidden_size // tp
    layers = 2 * T * (sum(holding.matrices) - ends)
    masked = mean_masked_share(config) * T if holding.has_head else 0.0
    head = 2 * masked * model.padded_vocab_size * model.hidden_size / tp
    scores = holding.layers * T * layout.sequence_length * model.num_heads * model.head_dim / tp
    products, peak = PRODUCTS_REACH * chip.peak_flops, chip.peak_flops
    memory = MEMORY_REACHES * chip.memory_rate
    other_forward, other_backward = _bytes_of_a_layer(layout)
    logits = masked * model.padded_vocab_size / tp
    again = head_made_again(config, layout.sequence_length)
    once = Pass(
        products=layers / products,
        attention=4 * scores / (ATTENTION_FORWARD_REACHES * peak),
        other=holding.layers * other_forward / memory,
    )
    # Difference from the highest logit, maximum, exponential, sum, quotient: 2+4, 2, 4+4, 4, 4+4 bytes. Backward: a
    # product (4+4) and a conversion (4+2), after a difference (2+4) and an exponential (4+4) where they are made again.
    forward = once + Pass(products=head / products, other=28 * logits / memory)
    backward = Pass(
        products=(2 * layers + (3 if again else 2) * head) / products,
        attention=10 * scores / (ATTENTION_BACKWARD_REACHES * peak),
        other=(holding.layers * other_backward + (28 if again else 14) * logits + _gradient_bytes(layout, holding))
        / memory,
    )
    if recompute == "full":
        backward += once
    elif recompute == "selective":
        backward += Pass(other=holding.layers * _norms_and_swiglu(layout) / memory)
    return forward, backward


def _norms_and_swiglu(layout: Layout) -> float:
    """Bytes read and written by two norms (2+2) and silu(gate) · up (2+2, 4+2), for elements of 2 bytes."""
    model, tp = layout.config.model, layout.config.parallel.tensor_parallel
    of_two = 8 * layout.residual_tokens * model.hidden_size + 10 * layout.tokens * model.ffn_hidden_size / tp
    return of_two * layout.element_bytes / 2


def _bytes_of_a_layer(layout: Layout) -> tuple[float, float]:
    """Bytes that a layer's operations between the matrix products read and write, forward and backward.

    Operation by operation, as torch's kernels are called (`training.kernels`; fused ones move less): rotation in fp32
    takes 32 bytes for each element of queries and keys (to fp32, a product, two halves added to, and back: 6 + 8 + 12 +
    6), and as much backward.
    """
    model: ModelConfig = layout.config.model
    tp, e = layout.config.parallel.tensor_parallel, layout.element_bytes
    rotated = layout.tokens * (model.num_heads + model.num_kv_heads) * model.head_dim / tp
    sums = 6 * e * layout.residual_tokens * model.hidden_size
    norms_and_swiglu = _norms_and_swiglu(layout)
    return norms_and_swiglu + 32 * rotated + sums, 2.5 * norms_and_swiglu + 32 * rotated + sums


def _gradient_bytes(layout: Layout, holding: Holding) -> float:
    """Bytes moved to add a micro-batch's gradients up, for every parameter.

    ZeRO 1: 2 read, 4 written as fp32, 8 read and 4 written in the sum. ZeRO 2 and 3: into the bucket (2+2), flat (2+2),
    to fp32 (2+4), and back.
    """
    return (18 if layout.config.parallel.zero_stage == 1 else 20) * holding.parameters


def _update(layout: Layout, holding: Holding, chip: Chip) -> float:
    """Norm and clipping of the gradients (read, read, write, and written with zeros), and Adam on the rank's part."""
    whole = sum(padded(sum(group), layout.copies) for group in holding.groups if group)
    own = whole // layout.copies
    gradients = whole if layout.config.parallel.zero_stage == 1 else own
    # Adam reads gradient, master and both moments and writes the last three; then the weights.
    adam = (7 * FP32 + layout.element_bytes) * own
    clipping = 4 * FP32 * gradients / (MEMORY_REACHES * chip.memory_rate)
    if layout.config.parallel.offload_optimizer:
        return clipping + (FP32 + layout.element_bytes) * own / TO_HOST_RATE + adam / HOST_MEMORY_RATE
    return clipping + adam / (MEMORY_REACHES * chip.memory_rate)
