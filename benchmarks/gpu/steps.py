"""Whole steps of the 8B recipe with as many layers as fit: the engine over the micro-batch, against the plain loop."""

import tempfile
import time
import zlib
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from common import ROOT, make_data
from engine_vs_plain import LEARNING_RATE, plain_step
from torch import Tensor

from benchmarks.gpu.measure import RECIPE, Ceilings, Plot, Row, Section, Sizes, forget, gib, peak_memory, row
from benchmarks.gpu.split import time_split
from llada_train.config.schema import Config
from llada_train.data.batch import Batch
from llada_train.data.loader import TrainingLoader
from llada_train.data.rows import PretrainingData
from llada_train.model.sizes import parameter_count, tensor_specs
from llada_train.parallel.engine import Engine
from llada_train.parallel.topology import Topology, device_name
from llada_train.plan.chips import chip_of_device
from llada_train.plan.flops import flops_per_token, utilization
from llada_train.plan.layout import Layout
from llada_train.plan.memory import memory

WARMUP = 2
FORMULA = (
    "MFU = (6·N + 12·L·S·d) · tokens/s ÷ peak, N without the input embedding, attention without a causal mask, the "
    "head counted in full though only masked positions pass through it"
)
TrainStep = Callable[[list[Batch]], float]


def steps(sizes: Sizes, ceiling: Ceilings, here: Topology) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data, 20 if sizes.tiny else None)
        return _steps(sizes, ceiling, here, data)


def _steps(sizes: Sizes, ceiling: Ceilings, here: Topology, data: Path) -> Section:
    config = _largest(sizes, data)
    model, training = config.model, config.training
    section = Section(
        "Whole steps",
        f"{RECIPE.relative_to(ROOT)} with {model.num_layers} of its layers ({parameter_count(model):,} parameters), "
        f"all on one device; rows of {config.data.sequence_length:,} tokens, {training.global_batch_size} in a step, "
        f"none of them cut; recompute {training.recompute}, ZeRO {config.parallel.zero_stage}. The plain loop: "
        "model/hf, logits of all tokens, autocast over fp32 weights, nothing recomputed. All from the same weights, "
        f"over the same batches; their first losses agree (2e-2). {FORMULA}.",
        plot=Plot(x="micro-batch", y="tokens/s", lines="loop"),
    )
    losses: dict[str, float] = {}

    def add(loop: str, micro_batch: int, make: Callable[[Config], TrainStep]) -> None:
        def measure() -> Row:
            row, losses[f"{loop} {micro_batch}"] = _measured(config, micro_batch, make, sizes, ceiling)
            return row

        section.rows.append(row({"loop": loop, "micro-batch": float(micro_batch)}, measure, sizes))

    for micro_batch in sizes.micro_batches[:1]:
        add("plain", micro_batch, lambda config: plain_step(config, _Weights(config, sizes.device)))
    engine = Engine(config, here)
    for micro_batch in sizes.micro_batches:
        add("engine", micro_batch, lambda config: _engine_step(engine, config, sizes))
    batches = _loader(config, sizes.micro_batches[-1]).global_batch(0)
    split, section.extra["longest kernels"] = time_split(
        engine, lambda: engine.train_step(batches, LEARNING_RATE), cuda=not sizes.tiny
    )
    whole = sum(split.values())
    section.tables[f"Where the time of a step goes, micro-batch {sizes.micro_batches[-1]}, by torch's profiler"] = [
        {"cause": cause, "ms": 1e3 * took, "% of the step": 100 * took / whole} for cause, took in split.items()
    ]
    if not sizes.tiny:
        del engine
        forget(sizes)
        unfused = Engine(_with(config, kernels="torch"), here)
        add("engine, kernels torch", sizes.micro_batches[-1], lambda config: _engine_step(unfused, config, sizes))
    first = next(iter(losses.values()))
    if any(abs(loss - first) > 2e-2 * abs(first) for loss in losses.values()):
        section.problems.append(f"not the same work: the first losses are {losses}")
    return section


def _largest(sizes: Sizes, data: Path) -> Config:
    """With as many layers as the plan says fit into nine tenths of the free memory, at the largest micro-batch."""

    def config(layers: int) -> Config:
        return sizes.config(
            data,
            model__num_layers=layers,
            training__micro_batch_size=sizes.micro_batches[-1],
            objective__random_length_probability=0,  # the plain loop knows no padding
        )

    if sizes.tiny:
        return config(2)
    free = 0.9 * torch.cuda.mem_get_info()[0]

    def needs(layers: int) -> int:
        one = config(layers)
        return memory(Layout(one, 1, one.data.sequence_length, one.training.global_batch_size))[0].total

    layers = max((n for n in range(1, 33) if needs(n) <= free), default=0)
    if not layers:
        raise RuntimeError(f"not even one layer of the 8B fits into {free / 2**30:.0f} GiB")
    return config(layers)


def _measured(
    config: Config, micro_batch: int, make: Callable[[Config], TrainStep], sizes: Sizes, ceiling: Ceilings
) -> tuple[Row, float]:
    """Time, memory, and the loss of the first step."""
    rounds = max(2, sizes.rounds // 2)
    batches = _batches(config, micro_batch, WARMUP + rounds)
    train_step = make(config)
    first, waits = 0.0, []
    with peak_memory(sizes) as peak:
        for i in range(WARMUP + rounds):
            if i == WARMUP:
                began = time.perf_counter()
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            loss = train_step(batch)  # on the host, so the step is done
            first = loss if i == 0 else first
        if not sizes.tiny:
            torch.cuda.synchronize()
        took = (time.perf_counter() - began) / rounds
    batches.close()
    rate = config.training.global_batch_size * config.data.sequence_length / took
    flops = rate * flops_per_token(config.model, config.data.sequence_length)
    chip = None if sizes.tiny else chip_of_device(device_name(sizes.device))
    return {
        "s per step": took,
        "tokens/s": rate,
        "MFU %": 100 * utilization(flops, chip.peak_flops, 1) if chip else None,
        "of a large product": flops / ceiling.flops,
        "peak GiB": gib(peak.total),
        "data wait %": 100 * sum(waits[WARMUP:]) / rounds / took,
    }, first


def _loader(config: Config, micro_batch: int) -> TrainingLoader:
    config = _with(config, micro_batch_size=micro_batch)
    return TrainingLoader(PretrainingData(config), config)


def _with(config: Config, **training: object) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _batches(config: Config, micro_batch: int, count: int) -> Generator[list[Batch], None, None]:
    made = _loader(config, micro_batch).iterate(0, count * config.training.global_batch_size)
    try:
        for batch in made:
            yield batch.batches
    finally:
        made.close()


class _Weights:
    """Random weights of the recipe's spread, made on the device: the plain loop's and the engine's are the same."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._specs, self._device = tensor_specs(config.model), device

    def names(self) -> list[str]:
        return list(self._specs)

    def read(self, name: str) -> Tensor:
        spec = self._specs[name]
        if spec.init_std is None:
            return torch.ones(spec.shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(spec.shape, device=self._device, generator=generator).mul_(spec.init_std)


def _engine_step(engine: Engine, config: Config, sizes: Sizes) -> TrainStep:
    weights = _Weights(config, sizes.device)
    engine.set_weights(lambda shard: shard.of(weights.read(shard.name)))
    return lambda batches: engine.train_step(batches, LEARNING_RATE).losses.loss
