"""What DeepSpeed ZeRO leaves of the weights and the optimizer's state on this rank, by shard."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from llada_train.model.sizes import FIRST_MOMENT, MASTER, SECOND_MOMENT, slice_runs
from llada_train.model.weights import Shard


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose optimizer state this rank owns: flat elements [start, stop) of the shard."""

    shard: Shard
    start: int
    stop: int
    state: dict[str, Tensor]  # MASTER, FIRST_MOMENT, SECOND_MOMENT: flat fp32 views of stop − start elements

    def runs(self) -> list[tuple[int, int]]:
        """The fragment as (start, length) ranges of the flattened global tensor."""
        return slice_runs(self.shard.spec, self.shard.index, self.shard.count, self.start, self.stop)


class ZeroState(ABC):
    """The state that this rank owns. Views: writing to them changes it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer  # DeepSpeed's wrapper
        self._adam = optimizer.optimizer
        for partition in self._partitions():  # zero moments, so that a checkpoint can be loaded without a step
            self._adam.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                FIRST_MOMENT: torch.zeros_like(partition),
                SECOND_MOMENT: torch.zeros_like(partition),
            }

    @property
    def steps(self) -> int:
        """Steps that Adam has taken (its bias correction counts them)."""
        return int(self._adam.state[self._partitions()[0]]["step"])

    @steps.setter
    def steps(self, steps: int) -> None:
        for partition in self._partitions():
            self._adam.state[partition]["step"].fill_(steps)

    @abstractmethod
    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that Adam updates."""

    @abstractmethod
    def write(self, shard: Shard, value: Tensor) -> None:
        """Set a shard's weights, and the fp32 master that this rank owns of them, from the shard's fp32 value."""

    @abstractmethod
    def fragments(self, shards: list[Shard]) -> Iterator[Fragment]:
        """What this rank owns of each shard, where it owns any."""


class FlatPartition(ZeroState):
    """ZeRO 1 and 2: a rank owns one range of all parameters laid end to end."""

    def _partitions(self) -> list[Tensor]:
        return [partition for group in self._adam.param_groups for partition in group["params"]]

    def write(self, shard: Shard, value: Tensor) -> None:
        with torch.no_grad():
            shard.parameter.copy_(value.view_as(shard.parameter))
        mapping = shard.parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            address = mapping.lp_fragment_address
            mapping.hp_fragment.data.copy_(value.flatten()[address.start : address.start + address.numel])

    def fragments(self, shards: list[Shard]) -> Iterator[Fragment]:
        self._optimizer._lazy_init_hp_params_optimizer_state()
        for shard in shards:
            mapping = shard.parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            address = mapping.lp_fragment_address
            state = {
                MASTER: mapping.hp_fragment.detach(),
                FIRST_MOMENT: mapping.get_optim_state_fragment(FIRST_MOMENT),
                SECOND_MOMENT: mapping.get_optim_state_fragment(SECOND_MOMENT),
            }
            yield Fragment(shard, address.start, address.start + address.numel, state)


class ParameterPartition(ZeroState):
    """ZeRO 3: a rank owns one range of each parameter, of the weights too; small ones stay whole besides."""

    def _partitions(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def write(self, shard: Shard, value: Tensor) -> None:
        parameter: Any = shard.parameter
        start, stop = self._range(parameter)
        own = value.flatten()[start:stop]
        parameter.ds_tensor.data[: stop - start].copy_(own)
        self._own(parameter, None)[: stop - start].data.copy_(own)
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.data.copy_(value.view(shard.shape))

    def fragments(self, shards: list[Shard]) -> Iterator[Fragment]:
        for shard in shards:
            start, stop = self._range(shard.parameter)
            if start < stop:
                keys = {MASTER: None, FIRST_MOMENT: FIRST_MOMENT, SECOND_MOMENT: SECOND_MOMENT}
                state = {kind: self._own(shard.parameter, key)[: stop - start].detach() for kind, key in keys.items()}
                yield Fragment(shard, start, stop, state)

    def _range(self, parameter: Any) -> tuple[int, int]:
        size = parameter.partition_numel()
        start = min(self._optimizer._get_param_partition_rank(parameter) * size, parameter.ds_numel)
        return start, min(start + size, parameter.ds_numel)

    def _own(self, parameter: Any, key: str | None) -> Tensor:
        partition: Tensor = self._optimizer._get_fp32_opt_state_partition(parameter, True, key)[0]
        return partition
