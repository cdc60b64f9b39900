"""On a GPU only: a step asks the device for nothing between its forwards and backwards, and its batches are pinned."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch

from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.data.batch import Batch
from llada_train.data.loader import TrainingLoader
from llada_train.data.rows import PretrainingData

if TYPE_CHECKING:
    from llada_train.parallel.engine import Engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROWS = 16


@pytest.fixture(params=[1, 2], ids=lambda stage: f"zero{stage}")
def config(make_config: Callable[..., Path], request: pytest.FixtureRequest) -> Config:
    training = {"global_batch_size": ROWS, "micro_batch_size": 2, "precision": "bf16", "kernels": "torch"}
    return load_config(make_config(training=training, parallel={"zero_stage": request.param}), [], 1)


@pytest.fixture
def batches(config: Config) -> Iterator[list[Batch]]:
    made = TrainingLoader(PretrainingData(config), config).iterate(0, ROWS)
    yield next(made).batches
    made.close()


def test_batches_are_made_in_pinned_memory(batches: list[Batch]) -> None:
    for batch in batches:
        assert batch.input_ids.is_pinned() and batch.masked_positions.is_pinned() and batch.loss_weight.is_pinned()


def test_micro_batches_wait_for_nothing_on_the_device(config: Config, batches: list[Batch]) -> None:
    """Times that the host waits for the device in a step: a few at its end, none for each micro-batch."""
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel import topology
    from llada_train.parallel.engine import Engine

    with mock.patch.dict(os.environ):
        topology.quiet_engines()
        here = topology.initialize(config.parallel)
        try:
            engine = Engine(config, here)
            initial = InitialWeights(config.model, config.seed)
            engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
            for _ in range(2):
                engine.train_step(batches, 1e-3)
            few, many = (waits(engine, batches[:count]) for count in (2, len(batches)))
        finally:
            topology.shutdown()
    assert len(many) == len(few), "\n".join(sorted(many))
    assert many  # the losses are read at the end: the debug mode does see what waits


def waits(engine: "Engine", batches: list[Batch]) -> list[str]:
    """Where the host waited for the device, once for each time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.train_step(batches, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing CUDA operation" in str(one.message)]
