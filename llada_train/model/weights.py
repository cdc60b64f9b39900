"""This rank's slices of the global tensors, and LLaDA's initialisation of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from llada_train.config.schema import ModelConfig
from llada_train.model.sizes import TensorSpec, slice_runs, tensor_specs
from llada_train.model.transformer import LLaDATransformer


@dataclass(frozen=True)
class Shard:
    """A parameter of this rank as slice `index` of `count` of the global tensor `name`."""

    name: str
    spec: TensorSpec
    index: int
    count: int
    owned: bool  # of ranks that hold equal copies (a norm's, under tensor parallelism) one owns it
    parameter: torch.nn.Parameter

    def runs(self) -> list[tuple[int, int]]:
        """The slice as (start, length) ranges of the flattened global tensor, in the slice's own order."""
        return slice_runs(self.spec, self.index, self.count)

    def of(self, full: Tensor) -> Tensor:
        """This rank's slice of the global tensor, in the parameter's shape."""
        if self.spec.partition_dim is None:
            return full
        return full.chunk(self.count, self.spec.partition_dim)[self.index].reshape(self.parameter.shape)


def shards(model: LLaDATransformer, config: ModelConfig) -> Iterator[Shard]:
    """Every parameter of this pipeline stage, under its global name."""
    specs = tensor_specs(config)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    # Layers are numbered from 1 over the whole model, and from 0 within a stage.
    offset = model.decoder.layers[0].layer_number - 1
    for local_name, parameter in model.named_parameters():
        parts = local_name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        name = ".".join(parts)
        spec = specs[name]
        sliced = spec.partition_dim is not None
        yield Shard(name, spec, rank if sliced else 0, size if sliced else 1, sliced or rank == 0, parameter)


def initial_tensor(name: str, spec: TensorSpec, seed: int) -> Tensor:
    """The global tensor's initial fp32 value, a function of seed and name alone: the same in every layout.

    Normal with the table's σ, truncated at ±3σ (released config: `init_fn: mitchell`); norms are 1.
    """
    if spec.init_std is None:
        return torch.ones(spec.shape)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1
    generator = torch.Generator().manual_seed(key)
    std = spec.init_std
    return torch.nn.init.trunc_normal_(torch.empty(spec.shape), 0.0, std, -3 * std, 3 * std, generator=generator)
