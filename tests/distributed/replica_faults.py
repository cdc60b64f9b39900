"""Copies of parameters damaged on one of N processes, and what the check between ranks says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llada_train.parallel import topology

topology.quiet_engines()

import torch  # noqa: E402

from llada_train.config.errors import UserError  # noqa: E402
from llada_train.config.load import load_config  # noqa: E402
from llada_train.data.loader import TrainingLoader  # noqa: E402
from llada_train.data.rows import PretrainingData  # noqa: E402
from llada_train.model.sizes import MASTER  # noqa: E402
from llada_train.model.weights import initial_tensor  # noqa: E402
from llada_train.parallel.engine import Engine  # noqa: E402

STEPS = 2


@dataclass(frozen=True)
class Damage:
    rank: int
    names: tuple[str, ...]
    kind: Literal["flip", "flip master", "swap"] = "flip"


def verdicts(config_file: Path, overrides: list[str], damages: list[Damage], a_step_later: bool) -> list[str | None]:
    """What the check says on this rank: of the sound state after STEPS steps, then of each damage alone.

    `a_step_later`: the check comes after one more step with the damage, which is not undone.
    """
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = Engine(config, here)
    engine.set_weights(lambda shard: shard.of(initial_tensor(shard.name, shard.spec, config.seed)))
    loader = TrainingLoader(PretrainingData(config), config, here.place)

    def step(number: int) -> None:
        engine.train_step(loader.global_batch(number * config.training.global_batch_size), 1e-3)

    for number in range(STEPS):
        step(number)
    found = [_verdict(engine)]
    for damage in damages:
        _apply(engine, damage, here.rank)
        if a_step_later:
            step(STEPS)
        found.append(_verdict(engine))
        if not a_step_later:
            _apply(engine, damage, here.rank)  # done twice, each is undone
    topology.shutdown()
    return found


def _verdict(engine: Engine) -> str | None:
    try:
        engine.check_replicas(STEPS)
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
