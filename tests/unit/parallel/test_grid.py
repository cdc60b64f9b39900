"""What each process of a large grid holds and reads, found in one process: fake groups, weights without memory."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.data.loader import collate
from llada_train.data.place import Place, place_of
from llada_train.data.training_data import Sample
from llada_train.model.sizes import parameter_count, tensor_specs
from llada_train.model.transformer import LLaDATransformer, transformer_config
from llada_train.model.weights import Shard, shards
from llada_train.parallel import cpu, topology

PRETRAIN = Path(__file__).parents[3] / "configs/pretrain"
WORLD_SIZE = 1024
FIRST_SAMPLE = 7 * 1280  # the eighth step's


@pytest.fixture(scope="module", autouse=True)
def no_cuda() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        topology.quiet_engines()
        if not torch.cuda.is_available():
            cpu.prepare()
        yield


@dataclass(frozen=True)
class Process:
    """One process of a grid."""

    tensor: int
    pipeline: int
    place: Place
    shards: list[Shard]
    layers: dict[int, list[int]]  # stage, counted in the order of the forward pass → its layers
    samples: range  # what it reads of the global batch at FIRST_SAMPLE


def process(config: Config, rank: int, world_size: int = WORLD_SIZE) -> Process:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        place = topology.initialize_groups(config.parallel)
        assert place == place_of(rank, world_size, config.parallel)  # what knows no torch knows it as well
        with torch.device("meta"):
            model = LLaDATransformer(
                config.model,
                transformer_config(
                    config.model, config.parallel, config.training.precision, config.training.recompute, use_cpu=True
                ),
            )
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        rows, _ = place.rows(config.training.global_batch_size, config)
        return Process(
            tensor=parallel_state.get_tensor_model_parallel_rank(),
            pipeline=pipeline,
            place=place,
            shards=list(shards(model, config.model)),
            layers={
                chunk * config.parallel.pipeline_parallel + pipeline: [
                    layer.layer_number - 1 for layer in stage.decoder.layers
                ]
                for chunk, stage in enumerate(model.stages)
            },
            samples=range(FIRST_SAMPLE + rows.start, FIRST_SAMPLE + rows.stop),
        )
    finally:
        topology.shutdown()


def assert_holds_the_model_once(config: Config, copy: Sequence[Process]) -> None:
    """The processes of one model copy hold every element of every tensor; one of them owns it."""
    held: dict[str, list[Shard]] = defaultdict(list)
    for one in copy:
        for shard in one.shards:
            assert shard.parameter.is_meta, shard.name
            assert tuple(shard.shape) == tuple(shard.parameter.shape) == slice_shape(shard), shard.name
            held[shard.name].append(shard)
    specs = tensor_specs(config.model)
    assert held.keys() == specs.keys()
    for name, spec in specs.items():
        # A slice each, or an equal copy each.
        assert len(held[name]) == config.parallel.tensor_parallel, name
        starts, lengths = np.array(sorted(run for shard in held[name] if shard.owned for run in shard.runs())).T
        stops = starts + lengths
        assert (starts[0], stops[-1]) == (0, spec.numel), name
        assert np.array_equal(starts[1:], stops[:-1]), name
    owned = sum(math.prod(shard.shape) for shards in held.values() for shard in shards if shard.owned)
    assert owned == parameter_count(config.model)


def slice_shape(shard: Shard) -> tuple[int, ...]:
    """The table's shape, cut by tensor parallelism, as the vector or matrix that a layer multiplies with."""
    cut = [n // shard.count if axis == shard.spec.partition_dim else n for axis, n in enumerate(shard.spec.shape)]
    return (math.prod(cut[:-1]), cut[-1]) if len(cut) > 1 else (cut[0],)


def assert_stages_follow_each_other(config: Config, copy: Sequence[Process]) -> None:
    """Each has layers, all in order; the last has the head besides, and so never more layers than another."""
    stages = {stage: layers for one in copy for stage, layers in one.layers.items()}
    assert sorted(stages) == list(range(config.parallel.stages))
    assert [layer for stage in sorted(stages) for layer in stages[stage]] == list(range(config.model.num_layers))
    counts = [len(stages[stage]) for stage in sorted(stages)]
    assert counts[-1] == min(counts) > 0


def assert_reads_the_batch_once(config: Config, blocks: Sequence[range]) -> None:
    """The data-parallel ranks' blocks, of whole (groups of) micro-batches, make up the global batch."""
    read = sorted(sample for block in blocks for sample in block)
    assert read == list(range(FIRST_SAMPLE, FIRST_SAMPLE + config.training.global_batch_size))
    assert len({len(block) for block in blocks}) == 1
    assert len(blocks[0]) % (config.training.micro_batch_size * config.parallel.micro_batch_multiple) == 0


# --- LLaDA 8B on 1,024 processes: 8 (tensor) × 32 (data) × 4 (pipeline), the last the slowest to change


@pytest.fixture(scope="module")
def grid() -> Config:
    parallel = "parallel={tensor_parallel: 8, pipeline_parallel: 4, sequence_parallel: true}"
    return load_config(PRETRAIN / "llada_8b.yaml", [parallel], WORLD_SIZE)


@pytest.fixture(scope="module")
def model_copy(grid: Config) -> list[Process]:
    """The 32 processes of data-parallel rank 17."""
    return [process(grid, tensor + 8 * 17 + 256 * pipeline) for pipeline in range(4) for tensor in range(8)]


def test_a_model_copy_of_1024_processes_is_llada_8b(grid: Config, model_copy: list[Process]) -> None:
    assert {(one.tensor, one.pipeline) for one in model_copy} == {(t, p) for t in range(8) for p in range(4)}
    assert_holds_the_model_once(grid, model_copy)
    assert_stages_follow_each_other(grid, model_copy)
    owned = sum(shard.parameter.numel() for one in model_copy for shard in one.shards if shard.owned)
    assert owned == 8_015_581_184  # the paper, Tab. 5


@pytest.mark.parametrize(
    ("rank", "tensor", "pipeline", "data"), [(0, 0, 0, 0), (137, 1, 0, 17), (600, 0, 2, 11), (1023, 7, 3, 31)]
)
def test_a_rank_of_1024_holds_and_reads_its_part(
    grid: Config, rank: int, tensor: int, pipeline: int, data: int
) -> None:
    one = process(grid, rank)
    assert (one.tensor, one.pipeline, one.place) == (tensor, pipeline, Place(data, 32))
    assert one.layers == {pipeline: list(range(8 * pipeline, 8 * pipeline + 8))}
    assert one.samples == range(FIRST_SAMPLE + 40 * data, FIRST_SAMPLE + 40 * data + 40)
    runs = {shard.name: shard.runs() for shard in one.shards}
    rows = [(tensor * 15_808 * 4096, 15_808 * 4096)]  # 126,464 ÷ 8 of the vocabulary
    assert runs.get("embedding.weight") == (rows if pipeline == 0 else None)
    assert runs.get("head.weight") == (rows if pipeline == 3 else None)


def test_data_parallel_ranks_of_1024_read_the_batch_once(grid: Config, model_copy: list[Process]) -> None:
    assert len({one.samples for one in model_copy}) == 1
    blocks = [process(grid, 3 + 8 * data + 256 * 2).samples for data in range(32)]
    assert_reads_the_batch_once(grid, blocks)
    assert model_copy[0].samples == blocks[17]


# --- the same with interleaved stages and context parallelism: 4 (tensor) × 2 (context) × 32 (data) × 4 (pipeline)


@pytest.fixture(scope="module")
def interleaved() -> Config:
    parallel = {
        "tensor_parallel": 4,
        "pipeline_parallel": 4,
        "context_parallel": 2,
        "virtual_pipeline_parallel": 2,
        "sequence_parallel": True,
    }
    overrides = [f"parallel={json.dumps(parallel)}", "training.micro_batch_size=2"]
    return load_config(PRETRAIN / "llada_8b.yaml", overrides, WORLD_SIZE)


@pytest.fixture(scope="module")
def context_copies(interleaved: Config) -> list[list[Process]]:
    """The 2 × 16 processes of data-parallel rank 17: a model copy for each half of the columns."""
    return [
        [
            process(interleaved, tensor + 4 * context + 8 * 17 + 256 * pipeline)
            for pipeline in range(4)
            for tensor in range(4)
        ]
        for context in range(2)
    ]


def test_each_context_parallel_copy_of_1024_processes_is_llada_8b(
    interleaved: Config, context_copies: list[list[Process]]
) -> None:
    for context, copy in enumerate(context_copies):
        assert {one.place for one in copy} == {Place(17, 32, context, 2)}
        assert {(one.tensor, one.pipeline) for one in copy} == {(t, p) for t in range(4) for p in range(4)}
        assert_holds_the_model_once(interleaved, copy)
        assert_stages_follow_each_other(interleaved, copy)
        # Chunk 0 of all four processes comes before chunk 1 of the first.
        assert copy[4].layers == {1: [4, 5, 6, 7], 5: [20, 21, 22, 23]}


def test_context_parallel_peers_of_1024_share_rows_and_split_columns(
    interleaved: Config, context_copies: list[list[Process]]
) -> None:
    assert len({one.samples for copy in context_copies for one in copy}) == 1
    blocks = [process(interleaved, 8 * data).samples for data in range(32)]
    assert_reads_the_batch_once(interleaved, blocks)
    assert context_copies[0][0].samples == blocks[17]
    length = interleaved.data.sequence_length
    sample = Sample(
        0, np.arange(length), np.zeros(length, bool), mask_probability=0.5, loss_weight=0.0, document_lengths=(length,)
    )
    halves = [collate([(sample,)], length, mask_id=-1, padding_id=-1, place=copy[0].place) for copy in context_copies]
    assert torch.cat([half.input_ids for half in halves], dim=1).tolist() == [list(range(length))]
    assert torch.cat([half.position_ids for half in halves], dim=1).tolist() == [list(range(length))]


# --- the rules of the config against what builds


@dataclass(frozen=True)
class Case:
    """Sections of a config, and how many processes are started."""

    sections: dict[str, dict[str, Any]]
    world_size: int

    def load(self) -> Config:
        overrides = [f"{name}={json.dumps(values)}" for name, values in self.sections.items()]
        return load_config(PRETRAIN / "demo.yaml", overrides, self.world_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small models in layouts of some dozens of processes; the sizes mostly fit together, so that many are accepted."""

    def mostly(fitting: Sequence[Any], anything: Sequence[Any]) -> Any:
        return draw(st.sampled_from(fitting if draw(st.sampled_from([True] * 15 + [False])) else anything))

    some = range(1, 13)
    tensor, context = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 1, 2, 3]))
    pipeline = draw(st.integers(1, 4))
    virtual = mostly(range(1, 4) if pipeline > 1 else [1], range(1, 4))
    together, stages = tensor * pipeline * context, pipeline * virtual
    data = draw(st.integers(1, min(3, 64 // together)))
    groups = mostly([tensor, 2 * tensor], some)
    heads = groups * draw(st.integers(1, 3)) + mostly([0], some)
    micro_batch = draw(st.integers(1, 2))
    step = micro_batch * data * (pipeline if virtual > 1 else 1)
    return Case(
        sections={
            "model": {
                "num_layers": mostly(range(stages, stages + 4), some),
                "num_heads": heads,
                "num_kv_heads": groups,
                "hidden_size": heads * mostly([2, 4], [1, 3]),
                "ffn_hidden_size": tensor * 5 + mostly([0], some),
                "vocab_size": mostly([300, 384], [100, 500]),  # 384 is 3 × 128: divisible by 1 … 4
                "max_sequence_length": 48,
            },
            "data": {
                "tokenizer": "unread",
                "sequence_length": mostly(
                    [tensor * context, 48 // (tensor * context) * tensor * context], range(1, 51)
                ),
                "corpora": [{"path": "unread"}],
            },
            "training": {
                "global_batch_size": mostly([step, 2 * step, 3 * step], some),
                "micro_batch_size": micro_batch,
                "precision": draw(st.sampled_from(["bf16", "fp32"])),
                "recompute": draw(st.sampled_from(["none", "selective", "full"])),
            },
            "parallel": {
                "tensor_parallel": tensor,
                "pipeline_parallel": pipeline,
                "virtual_pipeline_parallel": virtual,
                "context_parallel": context,
                "sequence_parallel": mostly([False, tensor > 1], [True]),
                "zero_stage": mostly([1, 2, 3] if pipeline == 1 else [1], [2, 3]),
            },
        },
        world_size=together * data + mostly([0], some),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_what_the_rules_accept_can_be_built(case: Case) -> None:
    try:
        config = case.load()
    except UserError:
        assume(False)
    copies: dict[Place, list[Process]] = defaultdict(list)
    for rank in range(case.world_size):
        one = process(config, rank, case.world_size)
        copies[one.place].append(one)
    context = config.parallel.context_parallel
    data = case.world_size // config.parallel.processes_per_row
    assert copies.keys() == {Place(d, data, c, context) for d in range(data) for c in range(context)}
    for copy in copies.values():
        assert_holds_the_model_once(config, copy)
        assert_stages_follow_each_other(config, copy)
    for c in range(context):
        blocks = [{one.samples for one in copies[Place(d, data, c, context)]} for d in range(data)]
        assert_reads_the_batch_once(config, [block for (block,) in blocks])


@settings(max_examples=40, deadline=None)
@given(cases())
def test_what_the_rules_refuse_is_told_with_its_key(case: Case) -> None:
    try:
        case.load()
    except UserError as error:
        _, *problems = str(error).splitlines()
    else:
        assume(False)
    assert problems
    for problem in problems:
        place, _, message = problem.strip().partition(": ")
        section, _, setting = place.removesuffix(" (override)").partition(".")
        assert setting in case.sections[section] or (section, setting) == ("parallel", "")
        assert message
