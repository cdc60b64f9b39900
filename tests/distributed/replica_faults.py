"""Copies of parameters damaged on one of N processes, and what the check between ranks says of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from training_run import initial_engine

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data.loader import TrainingLoader
from llada_train.data.rows import PretrainingData
from llada_train.model.sizes import MASTER
from llada_train.parallel import topology
from llada_train.parallel.engine import Engine
from llada_train.parallel.replicas import check_replicas

STEPS = 2


@dataclass(frozen=True)
class Damage:
    rank: int
    names: tuple[str, ...]
    kind: Literal["flip", "flip master", "swap"] = "flip"


def verdicts(config_file: Path, overrides: list[str], damages: list[Damage]) -> list[str | None]:
    """What the check of step STEPS says on this rank: of the sound state, then of each damage alone."""
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = initial_engine(config, here)
    loader = TrainingLoader(PretrainingData(config), config, here.place)

    for number in range(STEPS):
        batches = loader.global_batch(number * config.training.global_batch_size)
        engine.train_step(batches, 1e-3, check_replicas_of_step=number)
    found = [_verdict(engine)]
    for damage in damages:
        _apply(engine, damage, here.rank)
        found.append(_verdict(engine))
        _apply(engine, damage, here.rank)  # done twice, each is undone
    topology.shutdown()
    return found


def damaged_step(config_file: Path, damage: Damage, steps: int) -> list[str | None]:
    """What each of so many steps with a check says, of damage done before the first."""
    config = load_config(config_file, ["parallel.tensor_parallel=2"], topology.world_size())
    here = topology.initialize(config.parallel)
    engine = initial_engine(config, here)
    batches = TrainingLoader(PretrainingData(config), config, here.place).global_batch(0)
    _apply(engine, damage, here.rank)
    found = [_said(lambda: engine.train_step(batches, 1e-3, check_replicas_of_step=STEPS)) for _ in range(steps)]
    topology.shutdown()
    return found


def _verdict(engine: Engine) -> str | None:
    return _said(lambda: check_replicas(engine.shards, STEPS))


def _said(action: Callable[[], object]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _apply(engine: Engine, damage: Damage, rank: int) -> None:
    if rank != damage.rank:
        return
    if damage.kind == "flip master":
        tensors = {fragment.shard.name: fragment.state[MASTER] for fragment in engine.fragments()}
    else:
        tensors = {shard.name: shard.parameter.detach() for shard in engine.shards}
    for name in damage.names:
        values = tensors[name].view(-1)
        bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
        if damage.kind == "swap":
            assert bits[0] != bits[-1]
            bits[[0, -1]] = bits[[-1, 0]]
        else:
            bits[len(bits) // 2] ^= 1
