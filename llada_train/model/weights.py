"""This rank's slices of the global tensors, and LLaDA's initialisation of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from llada_train.config.schema import ModelConfig
from llada_train.model.sizes import TensorSpec, slice_runs, tensor_specs
from llada_train.model.transformer import LLaDATransformer, Stage


@dataclass(frozen=True)
class Shard:
    """A parameter of this rank as slice `index` of `count` of the global tensor `name`."""

    name: str
    spec: TensorSpec
    index: int
    count: int
    owned: bool  # of ranks that hold equal copies (a norm's, under tensor parallelism) one owns it
    parameter: torch.nn.Parameter
    shape: torch.Size  # of the slice as the model holds it

    def runs(self) -> list[tuple[int, int]]:
        """The slice as (start, length) ranges of the flattened global tensor, in the slice's own order."""
        return slice_runs(self.spec, self.index, self.count)

    def of(self, full: Tensor) -> Tensor:
        """This rank's slice of the global tensor, in the parameter's shape."""
        if self.spec.partition_dim is None:
            return full
        return full.chunk(self.count, self.spec.partition_dim)[self.index].reshape(self.shape)


def shards(model: LLaDATransformer, config: ModelConfig) -> Iterator[Shard]:
    """Every parameter of this process's stages, under its global name."""
    specs = tensor_specs(config)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for stage in model.stages:
        assert isinstance(stage, Stage)
        for name, parameter in _global_names(stage):
            spec = specs[name]
            sliced = spec.partition_dim is not None
            yield Shard(
                name=name,
                spec=spec,
                index=rank if sliced else 0,
                count=size if sliced else 1,
                owned=sliced or rank == 0,
                parameter=parameter,
                shape=parameter.shape,
            )


def _global_names(stage: Stage) -> Iterator[tuple[str, torch.nn.Parameter]]:
    # Layers are numbered from 1 over the whole model, and from 0 within a stage.
    offset = stage.decoder.layers[0].layer_number - 1
    for local_name, parameter in stage.named_parameters():
        parts = local_name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        yield ".".join(parts), parameter


class InitialWeights:
    """LLaDA's initialisation as named global tensors, a function of seed and name alone: the same in every layout."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._specs, self._seed = tensor_specs(model), seed

    def names(self) -> list[str]:
        return list(self._specs)

    def read(self, name: str) -> Tensor:
        """fp32: normal with the table's σ, truncated at ±3σ (released config: `init_fn: mitchell`); norms are 1."""
        spec = self._specs[name]
        if spec.init_std is None:
            return torch.ones(spec.shape)
        key = int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8]) >> 1
        generator, std = torch.Generator().manual_seed(key), spec.init_std
        return torch.nn.init.trunc_normal_(torch.empty(spec.shape), 0.0, std, -3 * std, 3 * std, generator=generator)
