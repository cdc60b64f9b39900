"""Training in which a step was refused, and the same without that step."""

from pathlib import Path
from typing import NamedTuple

from training_run import digest_of_state, initial_engine

from llada_train.config.load import load_config
from llada_train.data.loader import TrainingLoader
from llada_train.data.rows import PretrainingData
from llada_train.parallel import topology


class Outcome(NamedTuple):
    norms: list[float]
    applied: list[bool]
    state: str  # digest of what the rank owns


def train(
    config_file: Path, overrides: list[str], numbers: list[int], refused: int | None, spoilt: int | None
) -> Outcome:
    """Steps on the batches of these numbers; one is refused, a weight of another is NaN on the last rank."""
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = initial_engine(config, here)
    loader = TrainingLoader(PretrainingData(config), config, here.place)
    steps = []
    for number in numbers:
        batches = loader.global_batch(number * config.training.global_batch_size)
        if number == spoilt and here.rank == here.world_size - 1:
            batches[0].loss_weight[0] = float("nan")
        refuses = number == refused
        steps.append(engine.train_step(batches, 1e-3, lambda loss, norm, refuses=refuses: not refuses))
    state = digest_of_state(engine)
    topology.shutdown()
    return Outcome([step.gradient_norm for step in steps], [step.applied for step in steps], state)
