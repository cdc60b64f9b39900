"""Every tensor of a LLaDA transformer in one table: name, global shape, tensor-parallel axis, initial spread.

The table comes from the config alone and is the same in every layout; checkpoints, initialisation, conversion and
parameter counts all read it. Shapes: H hidden, V padded vocabulary, F feed-forward, D head size.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

from llada_train.config.schema import ModelConfig

# Logits that the head holds at once: 1 GiB of fp32. More of them are made in pieces, and once more in backward.
CHUNK = 1 << 28
# The kinds of fp32 state that a run keeps of each tensor; the moments have Adam's own names.
MASTER, FIRST_MOMENT, SECOND_MOMENT = "master", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class TensorSpec:
    """One global tensor. `partition_dim` is the axis that tensor parallelism cuts; None: every rank holds all of it."""

    shape: tuple[int, ...]
    partition_dim: int | None
    init_std: float | None  # None: a norm's weight, initialised to 1 and free of weight decay

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def slice_runs(
    spec: TensorSpec, index: int, count: int, start: int = 0, stop: int | None = None
) -> list[tuple[int, int]]:
    """Slice `index` of `count` along the partition axis as (start, length) ranges of the flattened global tensor.

    `start` and `stop` keep only that flat range of the slice.
    """
    dim = spec.partition_dim or 0
    outer, row = math.prod(spec.shape[:dim]), math.prod(spec.shape[dim:])
    length = row // count
    stop = outer * length if stop is None else stop
    runs = []
    for o in range(start // length, -(-stop // length)):
        first, last = max(start - o * length, 0), min(stop - o * length, length)
        runs.append((o * row + index * length + first, last - first))
    return runs


def tensor_specs(model: ModelConfig) -> dict[str, TensorSpec]:
    """All tensors in forward order.

    `linear_qkv` holds, for each key-value head, its query heads, its key, its value. `linear_fc1` is [2, F, H] (gate,
    up), so that a slice of either axis is a slice of the global tensor. Initial spreads are the released model's
    `mitchell`: σ = 1/√d_in, and 1/√(2·d_in·(layer+1)) for the two matrices that write to the residual stream.
    """
    H, V, F, D = model.hidden_size, model.padded_vocab_size, model.ffn_hidden_size, model.head_dim
    into = 1 / math.sqrt(H)
    norm = TensorSpec((H,), None, None)
    specs = {"embedding.weight": TensorSpec((V, H), 0, into)}
    for i in range(model.num_layers):
        layer, queries = f"decoder.layers.{i}", model.num_heads * D
        specs[f"{layer}.input_layernorm.weight"] = norm
        specs[f"{layer}.self_attention.linear_qkv.weight"] = TensorSpec(
            (queries + 2 * model.num_kv_heads * D, H), 0, into
        )
        specs[f"{layer}.self_attention.linear_proj.weight"] = TensorSpec(
            (H, queries), 1, 1 / math.sqrt(2 * queries * (i + 1))
        )
        specs[f"{layer}.pre_mlp_layernorm.weight"] = norm
        specs[f"{layer}.mlp.linear_fc1.weight"] = TensorSpec((2, F, H), 1, into)
        specs[f"{layer}.mlp.linear_fc2.weight"] = TensorSpec((H, F), 1, 1 / math.sqrt(2 * F * (i + 1)))
    specs["decoder.final_layernorm.weight"] = norm
    specs["head.weight"] = TensorSpec((V, H), 0, into)
    return specs


def parameter_count(model: ModelConfig) -> int:
    return sum(spec.numel for spec in tensor_specs(model).values())


def non_embedding_parameter_count(model: ModelConfig) -> int:
    """Without the input embedding and the head, as the paper counts (Tab. 5)."""
    return parameter_count(model) - 2 * model.padded_vocab_size * model.hidden_size


def layers_of_stages(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage in the order of the forward pass; the last, with the head, never has more."""
    return [num_layers // stages + (i < num_layers % stages) for i in range(stages)]


def stage_of(name: str, num_layers: int, stages: int) -> int:
    """Which of the pipeline's stages holds a tensor of `tensor_specs`."""
    if name.startswith("decoder.layers."):
        layer, ends = int(name.split(".")[2]), accumulate(layers_of_stages(num_layers, stages))
        return next(stage for stage, end in enumerate(ends) if layer < end)
    return 0 if name.startswith("embedding.") else stages - 1
