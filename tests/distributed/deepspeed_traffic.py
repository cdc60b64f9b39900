"""What DeepSpeed sends of the gradients in one step, counted where it leaves torch."""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from training_run import initial_engine

from llada_train.config.load import load_config
from llada_train.data.loader import TrainingLoader
from llada_train.data.rows import PretrainingData
from llada_train.parallel import topology

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor")
GATHER = "all_gather_into_tensor"
A_NUMBER_OR_TWO = 64  # losses, norms


class Traffic(NamedTuple):
    reduced: Counter[tuple[str, torch.dtype]]  # elements that one rank gives, by collective
    largest: int  # of one call
    gathers: int  # calls that gather weights
    overlaps: bool  # as DeepSpeed understood it
    offloads: bool


def of_one_step(config_file: Path, overrides: list[str]) -> Traffic:
    """The third one's: ZeRO 3 learns in the first which weights come next."""
    config = load_config(config_file, overrides, topology.world_size())
    sent: Counter[tuple[str, torch.dtype]] = Counter()
    sizes: list[int] = []
    gathers: list[int] = []

    def counting(name: str, collective: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            size = max(tensor.numel() for tensor in tensors)
            between_several = named.get("group") is None or named["group"].size() > 1
            if name == GATHER:
                gathers.append(size)
            elif size > A_NUMBER_OR_TWO and between_several:
                sent[name, tensors[0].dtype] += size
                sizes.append(size)
            return collective(*arguments, **named)

        return call

    with ExitStack() as patches:
        for name in (*REDUCTIONS, GATHER):
            patches.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        here = topology.initialize(config.parallel)
        engine = initial_engine(config, here)
        batches = TrainingLoader(PretrainingData(config), config, here.place).global_batch(0)
        for _ in range(3):
            for counted in (sent, sizes, gathers):
                counted.clear()
            engine.train_step(batches, 1e-3)
        deepspeed = engine._engine
        found = Traffic(sent, max(sizes), len(gathers), deepspeed.zero_overlap_comm(), deepspeed.zero_cpu_offload())
    topology.shutdown()
    return found
