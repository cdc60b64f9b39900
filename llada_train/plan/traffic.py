"""What one GPU sends in a step, collective by collective, as megatron-core, DeepSpeed and the model call them.

Bytes of a collective are those of the whole tensor: the one that is reduced, gathered, or scattered. Letters as in
`plan.memory`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llada_train.plan.chips import Chip
from llada_train.plan.flops import mean_masked_share
from llada_train.plan.layout import Holding, Layout, padded
from llada_train.plan.memory import FP32, MAX_LIVE_PARAMETERS

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "reduce", "send"]
Group = Literal["tensor", "context", "pipeline", "copies"]  # copies: data × context, which hold the same weights
# What goes on meanwhile: nothing; the micro-batch's forward or backward pass; backward's other products.
Behind = Literal["nothing", "forward", "backward", "products"]

# Shares of the data sheets' rates that collectives reach, and what each one costs besides. Assumptions: NCCL's own
# tests show 0.8 to 0.9 for large tensors, and some ten microseconds for small ones.
REACHED_RATE = 0.8
START_SECONDS = 20e-6


@dataclass(frozen=True)
class Collective:
    purpose: str
    operation: Operation
    group: Group
    bytes: float
    count: int  # per step
    behind: Behind = "nothing"

    def sent(self, ranks: int) -> float:
        """Bytes that a GPU sends in a step, round a ring of the group (Patarasuk and Yuan, 2009, §3)."""
        if self.operation == "send":
            return self.bytes * self.count
        rounds = {"all-reduce": 2.0}.get(self.operation, 1.0)
        return rounds * (ranks - 1) / ranks * self.bytes * self.count


def traffic(layout: Layout, rank: int, masked_tokens: float | None = None) -> list[Collective]:
    """Of one pipeline rank; `masked_tokens`: that pass the head in one micro-batch; None: their mean.

    Not counted: sums of a few numbers (norms of gradients, losses).
    """
    holding = layout.holdings[rank]
    masked = layout.tokens * mean_masked_share(layout.config) if masked_tokens is None else masked_tokens
    calls = [*_tensor(layout, holding, masked), *_context(layout, holding), *_pipeline(layout, rank)]
    return [*calls, *_zero(layout, holding)]


def _tensor(layout: Layout, holding: Holding, masked: float) -> Iterator[Collective]:
    """Tensor and sequence parallelism (arXiv 1909.08053, §3; 2205.05198, §4.2), for every micro-batch.

    A layer sums its two results forward and two gradients backward; under sequence parallelism it gathers the inputs
    of its two pairs of products and scatters the sums, and gathers the inputs once more for the weights' gradients.
    """
    config = layout.config
    if config.parallel.tensor_parallel == 1:
        return
    H, m, e = config.model.hidden_size, layout.micro_batches, layout.element_bytes
    hidden, sequence = e * layout.tokens * H, config.parallel.sequence_parallel
    layers, passes = holding.layers * m, 2 if config.training.recompute == "full" else 1

    def call(purpose: str, operation: Operation, size: float, count: int, behind: Behind = "nothing") -> Collective:
        return Collective(purpose, operation, "tensor", size, count, behind)

    if sequence:
        yield call("layers", "all-gather", hidden, 2 * layers * passes)
        yield call("layers", "reduce-scatter", hidden, 2 * layers * passes)
        yield call("layers", "all-gather", hidden, 2 * layers, "products")
        yield call("layers", "reduce-scatter", hidden, 2 * layers, "products")
        yield call("layers", "all-gather", hidden, 2 * layers)
        yield call("norms", "all-reduce", FP32 * H, 2 * layers + m * holding.has_head)
    else:
        yield call("layers", "all-reduce", hidden, 2 * layers * passes)
        yield call("layers", "all-reduce", hidden, 2 * layers, "products")
    if holding.has_embedding:
        yield call("embedding", "reduce-scatter" if sequence else "all-reduce", hidden, m)
        if sequence:
            yield call("embedding", "all-gather", hidden, m)
    if holding.has_head:
        if sequence:
            yield call("head", "all-gather", hidden, m)
            yield call("head", "reduce-scatter", hidden, m)
        else:
            yield call("head", "all-reduce", e * masked * H, m)
        yield call("head", "all-reduce", FP32 * masked, m)  # the highest logit
        yield call("head", "all-reduce", 2 * FP32 * masked, m)  # the sum and the target's


def _context(layout: Layout, holding: Holding) -> Iterator[Collective]:
    """Keys and values of whole rows, gathered; their gradients, scattered (llada_train/model/attention.py)."""
    config = layout.config
    model, parallel = config.model, config.parallel
    if parallel.context_parallel == 1:
        return
    keys_and_values = 2 * model.num_kv_heads * model.head_dim // parallel.tensor_parallel
    size = layout.element_bytes * layout.tokens * parallel.context_parallel * keys_and_values
    layers, passes = holding.layers * layout.micro_batches, 2 if config.training.recompute == "full" else 1
    yield Collective("keys and values", "all-gather", "context", size, layers * passes)
    yield Collective("keys and values", "reduce-scatter", "context", size, layers)


def _pipeline(layout: Layout, rank: int) -> Iterator[Collective]:
    """Hidden states to the next stage, their gradients to the one before, for every micro-batch and chunk."""
    p, v = layout.config.parallel.pipeline_parallel, layout.config.parallel.virtual_pipeline_parallel
    if p == 1:
        return
    size = layout.element_bytes * layout.residual_tokens * layout.config.model.hidden_size
    stages = range(rank, p * v, p)
    forward, backward = sum(stage < p * v - 1 for stage in stages), sum(stage > 0 for stage in stages)
    yield Collective("hidden states", "send", "pipeline", size, (forward + backward) * layout.micro_batches)


def _zero(layout: Layout, holding: Holding) -> Iterator[Collective]:
    """DeepSpeed 0.19.8, gradients in fp32.

    - ZeRO 1 reduces the whole buffer once, after backward (`buffered_allreduce_fallback`). Nothing goes on meanwhile.
    - ZeRO 2 reduces every micro-batch's gradients, and reads its own part off an all-reduce (`allreduce_and_scatter`),
      or sends each rank its own, if it is told to scatter. The embedding's come last, and hide behind nothing.
    - Both gather the weights of all after the update.
    - ZeRO 3 gathers the weights for forward and, but for what stays live between them (about half of
      `stage3_max_reuse_distance` before the turn, and as much after it), for backward; every micro-batch's gradients
      are scattered (`__avg_scatter_grads`).
    """
    ranks, e, m = layout.copies, layout.element_bytes, layout.micro_batches
    if ranks == 1:
        return
    config = layout.config
    parallel, stage = config.parallel, config.parallel.zero_stage
    last = config.model.padded_vocab_size * config.model.hidden_size // parallel.tensor_parallel
    last *= holding.has_embedding and parallel.overlaps_reduction
    whole = sum(padded(sum(group), ranks) for group in holding.groups if group)
    behind: Behind = "backward" if parallel.overlaps_reduction else "nothing"
    if stage == 1:
        yield _reduction("all-reduce", FP32 * whole, 1)
    elif stage == 2:
        # One message for each owner, or one for all.
        operation: Operation = "reduce" if parallel.scatters_reduction else "all-reduce"
        calls = ranks if parallel.scatters_reduction else 1
        yield _reduction(operation, FP32 * (holding.parameters - last) / calls, calls * m, behind)
        if last:
            yield _reduction(operation, FP32 * last / calls, calls * m)
    if stage < 3:
        yield Collective("weights", "all-gather", "copies", e * whole, 1)
        return
    parts = ranks * sum(math.ceil(n / ranks) for n in holding.matrices)
    norms = ranks * sum(math.ceil(n / ranks) for n in holding.norms)
    again = max(0, parts - MAX_LIVE_PARAMETERS // 2)
    yield Collective("weights", "all-gather", "copies", e * parts, m, "forward")
    yield Collective("weights", "all-gather", "copies", e * again, m, "backward")
    yield Collective("norms", "all-gather", "copies", e * norms, 1)
    yield _reduction("reduce-scatter", FP32 * (parts + norms - last), m, behind)
    if last:
        yield _reduction("reduce-scatter", FP32 * last, m)


def _reduction(operation: Operation, size: float, count: int, behind: Behind = "nothing") -> Collective:
    return Collective("gradients", operation, "copies", size, count, behind)


# --- how long it takes


def group_size(layout: Layout, group: Group) -> int:
    parallel = layout.config.parallel
    return {
        "tensor": parallel.tensor_parallel,
        "context": parallel.context_parallel,
        "pipeline": parallel.pipeline_parallel,
        "copies": layout.copies,
    }[group]


def ranks_in_node(layout: Layout, group: Group) -> int:
    """How many of a group's ranks share a node: megatron-core numbers tensor, context, data, pipeline from within."""
    parallel = layout.config.parallel
    stride = {
        "tensor": 1,
        "context": parallel.tensor_parallel,
        "copies": parallel.tensor_parallel,
        "pipeline": parallel.tensor_parallel * layout.copies,
    }[group]
    return max(1, min(group_size(layout, group), layout.gpus_per_node // stride))


def seconds(collective: Collective, layout: Layout, chip: Chip) -> float:
    """Of all its calls in a step.

    A ring within a node goes at the links' rate. One over several nodes leaves each node once, through the adapters of
    all its ranks there together; a group of one rank in each node has that rank's adapter.
    """
    ranks, near = group_size(layout, collective.group), ranks_in_node(layout, collective.group)
    if near >= ranks:
        rate = chip.link_rate
    elif collective.operation == "send" or near == 1:
        rate = chip.network_rate
    else:
        rate = min(chip.network_rate * near, chip.link_rate)
    return collective.sent(ranks) / (rate * REACHED_RATE) + collective.count * START_SECONDS
