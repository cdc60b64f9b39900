"""Settings that contradict each other, layouts above all, are refused with what to change."""

import re
from pathlib import Path

import pytest
from good_config import GOOD, changed, problems, told
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llada_train.config.load import load_config
from llada_train.config.schema import Config


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("overrides", "key", "message", "mends"),
    [
        (
            ["model.hidden_size=66"],
            "model.num_heads",
            "hidden_size 66 is not divisible by num_heads 4",
            ["model.hidden_size=64"],
        ),
        (
            ["model.num_kv_heads=3"],
            "model.num_kv_heads",
            "num_heads 4 is not divisible by num_kv_heads 3",
            ["model.num_kv_heads=2"],
        ),
        (["model.hidden_size=4"], "model.num_heads", "head size 1 is odd", ["model.hidden_size=8"]),
        (["data.corpora.1.path=a"], "data.corpora", "a is listed more than once", ["data.corpora=[{path: a}]"]),
        (
            ["optimizer.learning_rate.1.until_tokens=9"],
            "optimizer.learning_rate.1.until_tokens",
            "9 does not come after the phase before, which ends at 100,000",
            ["optimizer.learning_rate.1.until_tokens=100001"],
        ),
        (
            ["parallel.tensor_parallel=4"],
            "parallel.tensor_parallel",
            "model.num_kv_heads 2 is not divisible by 4; it can be 1, 2",
            ["parallel.tensor_parallel=1", "parallel.tensor_parallel=2"],
        ),
        (
            ["parallel.tensor_parallel=2", "model.ffn_hidden_size=161"],
            "parallel.tensor_parallel",
            "model.ffn_hidden_size 161 is not divisible by 2; it can be 1",
            ["parallel.tensor_parallel=1"],
        ),
        (
            [
                "parallel.tensor_parallel=3",
                "model.hidden_size=48",
                "model.num_heads=6",
                "model.num_kv_heads=3",
                "model.ffn_hidden_size=159",
            ],
            "parallel.tensor_parallel",
            "model.padded_vocab_size 512 is not divisible by 3; it can be 1",
            ["parallel.tensor_parallel=1", "model.vocab_size=300"],  # the latter is padded to 3 × 128
        ),
        (
            ["parallel.virtual_pipeline_parallel=2"],
            "parallel.virtual_pipeline_parallel",
            "pipeline_parallel is 1; raise it or set this to 1",
            ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=1"],
        ),
        (
            ["parallel.pipeline_parallel=5"],
            "parallel.pipeline_parallel",
            "5 stages, but the model has 4 layers; at most that many stages can be",
            ["parallel.pipeline_parallel=4"],
        ),
        (
            ["parallel={pipeline_parallel: 3, virtual_pipeline_parallel: 2}"],
            "parallel.pipeline_parallel",
            "3 × virtual_pipeline_parallel 2 = 6 stages, but the model has 4 layers; at most that many stages can be",
            ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=1"],
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel",
            "tensor_parallel is 1; raise it or set this to false",
            ["parallel.tensor_parallel=2", "parallel.sequence_parallel=false"],
        ),
        (
            ["parallel={tensor_parallel: 2, sequence_parallel: true}", "data.sequence_length=127"],
            "parallel.sequence_parallel",
            "data.sequence_length 127 is not divisible by tensor_parallel 2; "
            "make the length a multiple of 2, or set this to false",
            ["data.sequence_length=126", "parallel.sequence_parallel=false"],
        ),
        (
            ["parallel={tensor_parallel: 2, context_parallel: 2, sequence_parallel: true}", "data.sequence_length=126"],
            "parallel.sequence_parallel",
            "data.sequence_length 126 ÷ context_parallel 2 is not divisible by tensor_parallel 2; "
            "make the length a multiple of 4, or set this to false",
            ["data.sequence_length=124", "parallel.sequence_parallel=false"],
        ),
        (
            ["parallel={tensor_parallel: 2, context_parallel: 3, sequence_parallel: true}", "data.sequence_length=124"],
            "parallel.context_parallel",  # and nothing about a slice that there is not
            "data.sequence_length 124 is not divisible by 3; it can be 1, 2, 4, 31, 62, 124",
            ["parallel.context_parallel=2", "data.sequence_length=126"],
        ),
        *(
            (
                [f"parallel={{pipeline_parallel: 2, zero_stage: {stage}}}"],
                "parallel.zero_stage",
                f"{stage} splits gradients that pipeline stages still add to; with pipeline_parallel 2 use "
                "zero_stage 1, or set pipeline_parallel to 1",
                ["parallel.zero_stage=1", "parallel.pipeline_parallel=1"],
            )
            for stage in (2, 3)
        ),
        *(
            (
                [f"parallel.{setting}={value}"],
                f"parallel.{setting}",
                "set zero_stage to 2 or 3 (without pipeline stages), or leave this out",
                [f"parallel={{zero_stage: 3, {setting}: {value}}}"],
            )
            for setting, value in {
                "overlap_comm": "true",
                "reduce_scatter": "true",
                "reduce_bucket_size": "1000",
                "offload_optimizer": "true",
            }.items()
        ),
        (
            ["parallel={zero_stage: 2, prefetch_bucket_size: 0}"],
            "parallel.prefetch_bucket_size",
            "ZeRO 2 gathers no weights while it computes; set zero_stage to 3, or leave this out",
            ["parallel.zero_stage=3", "parallel={zero_stage: 2}"],
        ),
        (
            ["parallel={zero_stage: 2, reduce_scatter: true}"],
            "parallel.reduce_scatter",
            "set overlap_comm to false or zero_stage to 3, or leave this out",
            ["parallel.overlap_comm=false", "parallel.zero_stage=3", "parallel.reduce_scatter=null"],
        ),
        (
            ["parallel={zero_stage: 3, reduce_scatter: false}"],
            "parallel.reduce_scatter",
            "ZeRO 3 always does; leave it out",
            ["parallel.reduce_scatter=null"],
        ),
        (
            ["data.sequence_length=129"],
            "data.sequence_length",
            "129 is more than model.max_sequence_length 128",
            ["data.sequence_length=128", "model.max_sequence_length=129"],
        ),
        (
            ["training.micro_batch_size=5"],
            "training.global_batch_size",
            "16 is not divisible by training.micro_batch_size 5",
            ["training.micro_batch_size=2", "training.global_batch_size=15"],
        ),
    ],
)
def test_settings_that_contradict_each_other(
    good: Path, overrides: list[str], key: str, message: str, mends: list[str]
) -> None:
    """The one problem is told where it can be mended; each setting that the message names mends it."""
    (line,) = problems(good, *overrides)
    assert line.startswith(f"{key} (")
    assert message in line
    for mend in mends:
        load_config(good, [*overrides, mend])


@pytest.mark.parametrize(
    "parallel",
    [
        "{tensor_parallel: 2, context_parallel: 4, sequence_parallel: true, zero_stage: 3}",
        "{pipeline_parallel: 3}",  # 4 layers: 2, 1, 1
        "{pipeline_parallel: 4, context_parallel: 2}",
        "{tensor_parallel: 2, pipeline_parallel: 2, virtual_pipeline_parallel: 2, sequence_parallel: true}",
    ],
)
def test_layouts_that_fit(good: Path, parallel: str) -> None:
    load_config(good, [f"parallel={parallel}"])


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 6), st.integers(1, 200), st.integers(1, 2000))
def test_the_tensor_parallel_sizes_that_a_refusal_lists_are_those_that_fit(
    tp: int, kv_heads: int, queries: int, ffn: int, vocab: int
) -> None:
    heads = kv_heads * queries
    model = {"num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": 8 * heads, "ffn_hidden_size": ffn}
    refused = told(changed(model={**model, "vocab_size": vocab}, parallel={"tensor_parallel": tp}))
    if refused:
        listed = {tuple(map(int, line.partition("; it can be ")[2].split(", "))) for line in refused}
        fitting = [
            size
            for size in range(1, heads + 1)
            if not told(changed(model={**model, "vocab_size": vocab}, parallel={"tensor_parallel": size}))
        ]
        assert listed == {tuple(fitting)}
        assert tp not in fitting


def test_contradictions_are_told_together(good: Path) -> None:
    overrides = ["parallel={pipeline_parallel: 5, zero_stage: 2, context_parallel: 3}", "training.micro_batch_size=5"]
    lines = problems(good, *overrides, "data.sequence_length=130", world_size=4)
    assert [re.split("[ :]", line)[0] for line in lines] == [
        "parallel.pipeline_parallel",
        "parallel.zero_stage",
        "parallel.context_parallel",
        "data.sequence_length",
        "training.global_batch_size",
        "parallel",  # 15 processes work on a row, and 4 were started
    ]


def test_a_size_that_fits_nothing_is_one_problem_with_every_reason(good: Path) -> None:
    (line,) = problems(good, "parallel.tensor_parallel=3")
    assert line.partition(": ")[2] == (
        "model.num_heads 4, model.num_kv_heads 2, model.ffn_hidden_size 160, model.padded_vocab_size 512 are not "
        "divisible by 3; it can be 1, 2"
    )


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["parallel={tensor_parallel: 2, pipeline_parallel: 2}"],
            6,
            "tensor_parallel 2 × pipeline_parallel 2 takes 4 processes for each row, but 6 were started; "
            "start a multiple of 4 (for example --processes 4)",
        ),
        (
            ["parallel={tensor_parallel: 2, context_parallel: 2}"],
            11,
            "tensor_parallel 2 × context_parallel 2 takes 4 processes for each row, but 11 were started; "
            "start a multiple of 4 (for example --processes 8)",
        ),
        (
            ["parallel={tensor_parallel: 2, pipeline_parallel: 3, context_parallel: 2}"],
            4,
            "tensor_parallel 2 × pipeline_parallel 3 × context_parallel 2 takes 12 processes for each row, "
            "but 4 were started; start a multiple of 12 (for example --processes 12)",
        ),
        (["parallel.pipeline_parallel=4"], 3, "(for example --processes 4)"),
        (
            [],
            3,
            "16 is not a multiple of micro_batch_size 4 × data-parallel 3 (3 processes ÷ 1) = 12; "
            "the next larger one is 24",
        ),
        (["parallel.tensor_parallel=2", "training.global_batch_size=8"], 6, "(6 processes ÷ 2) = 12"),
        (["parallel.context_parallel=2"], 6, "micro_batch_size 4 × data-parallel 3 (6 processes ÷ 2) = 12"),
        (
            ["parallel={pipeline_parallel: 2, virtual_pipeline_parallel: 2}", "training.global_batch_size=24"],
            4,
            "24 is not a multiple of micro_batch_size 4 × data-parallel 2 (4 processes ÷ 2) × pipeline_parallel 2 "
            "(the interleaved schedule takes that many micro-batches at a time) = 16; set micro_batch_size to 3, or "
            "raise this: the next larger one is 32",
        ),
    ],
)
def test_the_world_size_message_does_the_sum(good: Path, overrides: list[str], world_size: int, message: str) -> None:
    (line,) = problems(good, *overrides, world_size=world_size)
    assert message in line


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 2),
        ([], 4),
        (["parallel.context_parallel=2"], 8),  # columns are shared, so that 4 read other rows
        (["parallel={tensor_parallel: 2, pipeline_parallel: 3, context_parallel: 2}"], 24),
        (["parallel.pipeline_parallel=2", "training.global_batch_size=24"], 4),  # not interleaved: any number
    ],
)
def test_world_sizes_that_fit(good: Path, overrides: list[str], world_size: int) -> None:
    load_config(good, overrides, world_size)


@settings(deadline=None)
@given(
    parallel=st.fixed_dictionaries(
        {
            "tensor_parallel": st.sampled_from([1, 2]),
            "pipeline_parallel": st.integers(1, 3),
            "virtual_pipeline_parallel": st.integers(1, 2),
            "context_parallel": st.sampled_from([1, 2, 4]),
        }
    ),
    micro=st.integers(1, 5),
    micro_batches=st.integers(1, 40),
    data_parallel=st.integers(0, 8),
    over=st.sampled_from([0, 0, 1, 5]),
)
def test_what_a_refusal_of_the_world_size_proposes_is_accepted(
    parallel: dict[str, int], micro: int, micro_batches: int, data_parallel: int, over: int
) -> None:
    together = parallel["tensor_parallel"] * parallel["pipeline_parallel"] * parallel["context_parallel"]
    world_size = together * data_parallel + over
    interleaved = parallel["virtual_pipeline_parallel"] > 1
    assume(world_size > 0 and (parallel["pipeline_parallel"] > 1 or not interleaved))

    def config(batch: int, micro: int = micro) -> Config:
        training = {"global_batch_size": batch, "micro_batch_size": micro}
        return changed(model={"num_layers": 6}, parallel=parallel, training=training)

    def fits(batch: int) -> bool:
        """Whole micro-batches on each rank, and for the interleaved schedule whole groups of pipeline_parallel."""
        each, rest = divmod(batch, world_size // together * micro)
        return rest == 0 and not (interleaved and each % parallel["pipeline_parallel"])

    batch = micro * micro_batches
    refused = told(config(batch), world_size)
    if world_size % together:
        (line,) = refused
        proposed = re.search(r"start a multiple of (\d+) \(for example --processes (\d+)\)", line)
        assert proposed is not None
        assert int(proposed[1]) == together
        assert not [line for line in told(config(batch), int(proposed[2])) if "were started" in line]
    elif fits(batch):
        assert refused == []
    else:
        (line,) = refused
        larger = int(line.rpartition("the next larger one is ")[2])
        assert told(config(larger), world_size) == []
        assert larger > batch
        assert not any(fits(between) for between in range(batch, larger))
        smaller = [m for m in range(1, micro) if not told(config(batch, m), world_size)]
        assert re.findall(r"set micro_batch_size to (\d+)", line) == [str(m) for m in smaller[-1:]]
