"""Changes on the way: every value that the schedule brings keeps to the rules that hold for those of the start."""

from pathlib import Path

import pytest
from good_config import GOOD, line_of, problems

from llada_train.config.load import load_config, save_config

SCHEDULE = """\
schedule:
  - {from_tokens: 1.0e5, global_batch_size: 32}
  - {from_tokens: 300_000, sequence_length: 64, weights: {a: 0, b: 1.0}}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD + SCHEDULE)
    return path


def test_a_schedule_is_read_and_written(good: Path, tmp_path: Path) -> None:
    config = load_config(good, world_size=2)
    assert [change.from_tokens for change in config.schedule] == [100_000, 300_000]
    assert config.schedule[1].weights == {"a": 0.0, "b": 1.0}
    assert config.block_length == 128
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_block_is_as_long_as_the_longest_sequence(good: Path) -> None:
    assert load_config(good, ["data.sequence_length=32"]).block_length == 64
    assert load_config(good, ["data.block_length=384"]).block_length == 384


@pytest.mark.parametrize(
    ("overrides", "key", "message", "mends"),
    [
        (
            ["schedule.0.global_batch_size=30"],
            "schedule.0.global_batch_size",
            "30 is not divisible by training.micro_batch_size 4; it can be 32",
            ["schedule.0.global_batch_size=32", "training.micro_batch_size=2"],
        ),
        (
            ["schedule.1.sequence_length=256", "data.block_length=256"],
            "schedule.1.sequence_length",
            "256 is more than model.max_sequence_length 128",
            ["schedule.1.sequence_length=128", "model.max_sequence_length=256"],
        ),
        (
            ["schedule.1.sequence_length=32", "parallel.context_parallel=64"],
            "schedule.1.sequence_length",
            "32 is not a multiple of context_parallel 64 = 64",
            ["schedule.1.sequence_length=64"],
        ),
        (
            [
                "schedule.1.sequence_length=2",
                "parallel={tensor_parallel: 2, context_parallel: 2, sequence_parallel: true}",
            ],
            "schedule.1.sequence_length",
            "2 is not a multiple of context_parallel 2 × tensor_parallel 2 (sequence_parallel) = 4",
            ["schedule.1.sequence_length=4", "parallel.sequence_parallel=false"],
        ),
        (
            ["schedule.1.sequence_length=96"],
            "data.block_length",
            "128, the longest sequence length (none is given), is not a multiple of schedule.1.sequence_length 96; "
            "it can be any multiple of 384",
            ["data.block_length=384", "data.block_length=768"],
        ),
        (
            ["data.block_length=64"],
            "data.block_length",
            "64 is not a multiple of data.sequence_length 128; it can be any multiple of 128",
            ["data.block_length=128"],
        ),
        (
            ["schedule.1.from_tokens=100_000"],
            "schedule.1.from_tokens",
            "100,000 does not come after the change before, at 100,000",
            ["schedule.1.from_tokens=100_001"],
        ),
        (
            ["schedule.1.weights={c: 1}"],
            "schedule.1.weights",
            "c: not in data.corpora, which lists a, b",
            ["schedule.1.weights={a: 1}", "data.corpora=[{path: a}, {path: c}]"],
        ),
        (
            ["schedule.1.weights={a: 0, b: 0}"],
            "schedule.1.weights",
            "every weight is 0 from here on",
            ["schedule.1.weights={a: 0}"],
        ),
        (
            ["schedule.0={from_tokens: 5}"],
            "schedule.0.from_tokens",
            "nothing changes; give global_batch_size, sequence_length or weights",
            ["schedule.0.global_batch_size=32"],
        ),
        (
            ["data.corpora=[{path: a, weight: 0}, {path: b, weight: 0}]"],
            "data.corpora",
            "every weight is 0; at least one corpus has to be trained on",
            ["data.corpora.1.weight=1"],
        ),
    ],
)
def test_what_a_schedule_may_not_say(
    good: Path, overrides: list[str], key: str, message: str, mends: list[str]
) -> None:
    (line,) = problems(good, *overrides)
    assert line.startswith(f"{key} (")
    assert message in line
    for mend in mends:
        load_config(good, [*overrides, mend])


def test_a_fault_is_told_with_its_line(good: Path) -> None:
    good.write_text(good.read_text().replace("global_batch_size: 32", "global_batch_size: 30"))
    (line,) = problems(good)
    number = line_of(good.read_text(), "global_batch_size: 30")
    assert line.startswith(f"schedule.0.global_batch_size (good.yaml, line {number}): 30 is not divisible")


def test_every_batch_size_has_to_suit_the_processes(good: Path) -> None:
    load_config(good, ["schedule.0.global_batch_size=24"], world_size=2)
    (line,) = problems(good, "schedule.0.global_batch_size=20", world_size=2)
    assert line == (
        "schedule.0.global_batch_size (override): 20 is not a multiple of micro_batch_size 4 × data-parallel 2 "
        "(2 processes ÷ 1) = 8; set micro_batch_size to 2, or raise this: the next larger one is 24"
    )
    load_config(good, ["schedule.0.global_batch_size=20", "training.micro_batch_size=2"], world_size=2)
