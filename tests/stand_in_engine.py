"""What a checkpoint asks of an engine, over any tensors, without a model: each rank owns an equal range of each."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llada_train.config.schema import Config
from llada_train.data.loader import ALONE
from llada_train.model.sizes import FIRST_MOMENT, MASTER, SECOND_MOMENT, tensor_specs
from llada_train.model.weights import Shard
from llada_train.parallel.topology import Topology
from llada_train.parallel.zero import Fragment

KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)


class StandInEngine:
    def __init__(self, config: Config, seed: int = 0) -> None:
        self.config, self.optimizer_steps = config, 0
        self.topology = Topology(dist.get_rank(), dist.get_world_size(), ALONE, torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        self._fragments = []
        for name, spec in tensor_specs(config.model).items():
            start, stop = (spec.numel * (dist.get_rank() + i) // dist.get_world_size() for i in (0, 1))
            shard = Shard(name, spec, 0, 1, True, cast(Any, None), torch.Size(spec.shape))
            state = {kind: torch.randn(stop - start, generator=generator) for kind in KINDS}
            self._fragments.append(Fragment(shard, start, stop, state))

    def fragments(self) -> Iterator[Fragment]:
        yield from self._fragments

    def set_weights(self, read: Callable[[Shard], Tensor]) -> None:
        for fragment in self._fragments:
            fragment.state[MASTER].copy_(read(fragment.shard).flatten()[fragment.start : fragment.stop])

    def step(self) -> None:
        """Every number of the state changes."""
        self.optimizer_steps += 1
        for fragment in self._fragments:
            for state in fragment.state.values():
                state += 1

    def state(self) -> dict[str, Tensor]:
        return {f"{kind}/{f.shard.name}": state.clone() for f in self._fragments for kind, state in f.state.items()}
