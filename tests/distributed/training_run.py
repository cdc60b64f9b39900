"""A few steps of training as `llada-train pretrain` makes them, on one of N processes: what the layout matrix compares.

It is imported once, by the process that the N are forked from.
"""

import hashlib
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llada_train.parallel import topology

topology.quiet_engines()

import torch  # noqa: E402
from faults import FAULTS  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from llada_train.checkpoint.manifest import Progress  # noqa: E402
from llada_train.checkpoint.writer import CheckpointWriter  # noqa: E402
from llada_train.config.load import load_config  # noqa: E402
from llada_train.config.schema import Config  # noqa: E402
from llada_train.data.batch import Batch  # noqa: E402
from llada_train.data.loader import TrainingLoader, validation  # noqa: E402
from llada_train.data.opening import open_data  # noqa: E402
from llada_train.data.sft import SftData  # noqa: E402
from llada_train.evaluation.answers import prompts_and_responses, rows_to_fill  # noqa: E402
from llada_train.model.weights import InitialWeights  # noqa: E402
from llada_train.parallel.engine import Engine  # noqa: E402
from llada_train.parallel.topology import Topology  # noqa: E402
from llada_train.sampling.denoiser import Query  # noqa: E402
from llada_train.sampling.options import SamplingOptions  # noqa: E402
from llada_train.sampling.predict import Prediction  # noqa: E402
from llada_train.sampling.split import SplitDenoiser  # noqa: E402

LEARNING_RATE = 5e-4


@dataclass(frozen=True)
class Run:
    """What one rank saw."""

    losses: list[float]  # of each step
    norms: list[float]
    bounds_by_t: list[list[float | None]]
    validation: float
    digests: list[dict[int, int]]  # of each step: sample → digest of what this rank was given of it
    predicted: list[tuple[int, float]]  # SFT: id and log-probability at each mask after held-out prompts, in the end
    state: str  # digest of the masters and moments that the rank owns in the end
    model_rank: tuple[int, int]  # tensor- and pipeline-parallel rank


def train(config_file: Path, overrides: list[str], steps: int, checkpoints: Path, fault: str | None) -> Run:
    """Train from the config's own initial weights and save a checkpoint."""
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    with nullcontext() if fault is None else FAULTS[fault]():
        engine = initial_engine(config, here)
        data, size = open_data(config), config.training.global_batch_size
        loader = TrainingLoader(data, config, here.place)
        results, digests = [], []
        if isinstance(data, SftData):
            predictions(engine, data, config)  # which changes nothing of what follows
        for step in range(steps):
            batches = loader.global_batch(step * size)
            digests.append(digest(batches, masked_alone=config.sft is not None))
            results.append(engine.train_step(batches, LEARNING_RATE))
        held_out = validation(data, config, here.place)
        bounds = engine.evaluate(held_out.batches, len(held_out.t))
        predicted = predictions(engine, data, config) if isinstance(data, SftData) else []
        state = digest_of_state(engine)
        CheckpointWriter(checkpoints, engine).save(Progress(step=steps, consumed_samples=steps * size))
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    topology.shutdown()
    return Run(
        losses=[step.losses.loss for step in results],
        norms=[step.gradient_norm for step in results],
        bounds_by_t=[step.losses.bound_by_t() for step in results],
        validation=float(bounds.mean()),
        digests=digests,
        predicted=predicted,
        state=state,
        model_rank=(tensor, pipeline),
    )


def predictions(engine: Engine, data: SftData, config: Config) -> list[tuple[int, float]]:
    """After held-out prompts, row by row; on rank 0."""
    denoiser = SplitDenoiser(engine, data.tokenizer.mask_id, config.model.padded_vocab_size)
    read = Prediction(SamplingOptions(rules="released"), data.tokenizer.mask_id)
    found = denoiser.lead(lambda: denoiser(padded(rows_after_prompts(data), data.tokenizer.mask_id), read))
    return [] if found is None else [(int(id), math.log(p)) for id, p in found.tolist()]


def rows_after_prompts(data: SftData) -> list[list[int]]:
    """The first five held-out prompts, with masks after them."""
    prompts, responses = prompts_and_responses(data, data.validation_examples[:5])
    return rows_to_fill(data, prompts, responses)


def padded(rows: list[list[int]], mask_id: int) -> Query:
    """What is masked in rows of several lengths, some padded on the left and some on the right, is asked for."""
    longest, ids = max(map(len, rows)), []
    for number, row in enumerate(rows):
        padding = [-1] * (longest - len(row))
        ids.append(padding + row if number % 2 else row + padding)
    together = torch.tensor(ids)
    return Query(together.clamp(min=0), together == mask_id, together >= 0)


def norm_of_equal_micro_batches(config_file: Path, overrides: list[str], count: int, fault: str | None) -> float:
    """The gradient norm of `count` copies of one micro-batch."""
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    with nullcontext() if fault is None else FAULTS[fault]():
        engine = initial_engine(config, here)
        batch = TrainingLoader(open_data(config), config, here.place).global_batch(0)[0]
        norm = engine.train_step([batch] * count, LEARNING_RATE).gradient_norm
    topology.shutdown()
    return norm


def initial_engine(config: Config, here: Topology) -> Engine:
    """An engine with the config's own initial weights."""
    engine = Engine(config, here)
    initial = InitialWeights(config.model, config.seed)
    engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    return engine


def digest_of_state(engine: Engine) -> str:
    """Of the masters and moments that this rank owns."""
    state = hashlib.sha256(str(engine.optimizer_steps).encode())
    for fragment in engine.fragments():
        for tensor in fragment.state.values():
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def digest(batches: list[Batch], masked_alone: bool = False) -> dict[int, int]:
    """Sample → a sum over its tokens of a hash of place, id, target and weight: slices of a row add up to the row's.

    `masked_alone`: of masked tokens, wherever they lie, since how far a row is padded may depend on the layout; else a
    row is one sample.
    """
    digests: dict[int, int] = {}
    for batch in batches:
        B, S = batch.input_ids.shape
        counted = batch.loss_weight > 0
        targets = torch.full((B * S,), -1)
        targets[batch.masked_positions[counted]] = batch.targets[counted]
        weights = torch.zeros(B * S)
        weights[batch.masked_positions[counted]] = batch.loss_weight[counted]
        hashes = np.zeros((B, S), np.uint64)
        for part in (batch.position_ids, batch.input_ids, targets, weights.view(torch.int32).long()):
            hashes = _mix(hashes ^ part.view(B, S).numpy().astype(np.uint64))
        if masked_alone:
            places, samples = batch.masked_positions[counted], batch.masked_samples[counted]
        else:
            places, samples = torch.arange(B * S), torch.arange(B).repeat_interleave(S)
        sums = np.zeros(len(batch.sample_index), np.uint64)
        np.add.at(sums, samples.numpy(), hashes.ravel()[places.numpy()])
        digests |= zip(batch.sample_index.tolist(), sums.tolist(), strict=True)
    return digests


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
