"""Which settings a run that goes on may change, by announcing them or by accepting them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import sft_settings, write_config

from llada_train.checkpoint.manifest import Progress
from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.data.timeline import Timeline
from llada_train.training.changes import ConfigChanges, config_changes

BATCH, LENGTH = 16, 32
CONSUMED = 3 * BATCH
NOW = CONSUMED * LENGTH
SCHEDULE = [{"from_tokens": 600, "sequence_length": 16}, {"from_tokens": 4000, "global_batch_size": 32}]
CORPORA = [{"path": "a", "validation_documents": 20}, {"path": "b", "weight": 2.0}]


@pytest.fixture
def compare(make_config: Callable[..., Path]) -> Callable[..., ConfigChanges]:
    """`compare(given settings, schedule=[…])`: a run of 3 steps goes on with other settings."""

    def config_of(**settings: Any) -> Config:
        return load_config(make_config(**{"data__corpora": CORPORA, "schedule": SCHEDULE, **settings}))

    def compare(**settings: Any) -> ConfigChanges:
        stored = config_of()
        progress = Progress(step=3, consumed_samples=CONSUMED, phases=Timeline(stored).begun(CONSUMED))
        return config_changes(stored, progress, config_of(**settings))

    return compare


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": SCHEDULE[:1], "data__block_length": 32},  # what has not come yet is called off
        {"schedule": [*SCHEDULE, {"from_tokens": 5000, "weights": {"a": 0.5}}]},
        {"schedule": [SCHEDULE[0], {"from_tokens": 1280, "global_batch_size": 8}]},  # at the token where the run stands
        {"data__corpora": [*CORPORA, {"path": "c", "weight": 0, "validation_documents": 4}]},
        {
            "data__corpora": [*CORPORA, {"path": "c", "weight": 0}],
            "schedule": [*SCHEDULE, {"from_tokens": 5000, "weights": {"c": 1}}],
        },
        {"optimizer__learning_rate": [{"until_tokens": 9000, "end": 1e-4}], "training__micro_batch_size": 4},
        {"training__kernels": "compile", "training__recompute": "full"},
        {"data__block_length": 32},
        {"data__corpora": [CORPORA[0], {**CORPORA[1], "path": "elsewhere/b"}]},
    ],
)
def test_free_changes(compare: Callable[..., ConfigChanges], settings: dict[str, Any]) -> None:
    changes = compare(**settings)
    assert (list(changes.possible), list(changes.impossible)) == ([], [])


def test_a_corpus_that_moved_is_named_anew_in_the_schedule(make_config: Callable[..., Path]) -> None:
    """Also in a change that holds already."""

    def config_of(path: str) -> Config:
        schedule = [{"from_tokens": 600, "weights": {path: 3.0}}]
        return load_config(make_config(data__corpora=[CORPORA[0], {**CORPORA[1], "path": path}], schedule=schedule))

    stored = config_of("b")
    progress = Progress(step=3, consumed_samples=CONSUMED, phases=Timeline(stored).begun(CONSUMED))
    assert config_changes(stored, progress, config_of("elsewhere/b")) == ConfigChanges([], [], "")


def test_tokens_of_the_whole_run_stay(make_config: Callable[..., Path]) -> None:
    def config_of(a: int, b: int) -> Config:
        corpora = [{"path": "a", "tokens": a}, {"path": "b", "tokens": b}]
        return load_config(
            make_config(data__corpora=corpora, optimizer__learning_rate=[{"until_tokens": a + b, "end": 0.1}])
        )

    stored = config_of(2560, 2560)
    progress = Progress(step=3, consumed_samples=CONSUMED, phases=Timeline(stored).begun(CONSUMED))
    changes = config_changes(stored, progress, config_of(7680, 2560))
    assert changes.impossible == ["data.corpora.0.tokens: 2560 → 7680 " + changes.impossible[0].partition("7680 ")[2]]
    assert "give weights instead for what is to come" in changes.impossible[0]


@pytest.mark.parametrize(
    ("settings", "lines", "announced"),
    [
        ({"training__global_batch_size": 32}, ["training.global_batch_size: 16 → 32"], True),
        ({"schedule": SCHEDULE[1:], "data__block_length": 32}, ["schedule.0.from_tokens: 600 → None"], False),
        ({"schedule": [{"from_tokens": 700, "sequence_length": 16}]}, ["schedule.0.from_tokens: 600 → 700"], False),
        ({"data__corpora": [CORPORA[0], {"path": "b", "weight": 3}]}, ["data.corpora.1.weight: 2.0 → 3.0"], True),
        ({"data__corpora": [*CORPORA, {"path": "c", "weight": 1}]}, ["data.corpora.2.path: None → c"], True),
        ({"objective__t_sampling": "stratified"}, ["objective.t_sampling: uniform → stratified"], False),
        ({"optimizer__weight_decay": 0.2}, ["optimizer.weight_decay: 0.1 → 0.2"], False),
    ],
)  # fmt: skip
def test_changes_that_have_to_be_accepted(
    compare: Callable[..., ConfigChanges], settings: dict[str, Any], lines: list[str], announced: bool
) -> None:
    changes = compare(**settings)
    assert list(changes.impossible) == []
    assert [line for line in changes.possible if line in lines] == lines
    assert changes.hint == (
        "announce changes of batch size, length and weights in `schedule`, from_tokens 1,280 or later; or "
        if announced
        else ""
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model__num_layers": 2}, "model.num_layers: 4 → 2 (the checkpoint holds"),
        ({"seed": 7}, "seed: 1234 → 7 (the order of the data"),
        ({"data__block_length": 64}, "data.block_length: 32 → 64 (the data is shuffled in pieces of it"),
        (
            {"schedule": [SCHEDULE[0], {"from_tokens": 4000, "sequence_length": 64}]},
            "data.block_length: 32 → 64 (the data is shuffled in pieces of it, fixed when the run began; "
            "give data.block_length=32)",
        ),
        (
            {"data__sequence_length": 16, "data__block_length": 32},
            "data.sequence_length: 32 → 16 (schedule.0 has set it since; add a change to `schedule`)",
        ),
        ({"data__corpora": CORPORA[:1]}, "data.corpora.1.path: b → None (corpora keep their places"),
        (
            {"data__corpora": [{"path": "a", "validation_documents": 21}, CORPORA[1]]},
            "data.corpora.0.validation_documents: 20 → 21 (training has read, or left out, those documents",
        ),
    ],
)
def test_what_can_never_change(compare: Callable[..., ConfigChanges], settings: dict[str, Any], line: str) -> None:
    changes = compare(**settings)
    assert any(found.startswith(line) for found in changes.impossible)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sft__too_long": "drop"}, ["sft.too_long: truncate_response → drop"]),
        ({"data__sequence_length": 48}, ["data.sequence_length: 64 → 48"]),
        ({"sft__cache": "elsewhere", "sft__rows": "packed", "training__micro_batch_size": 4}, []),
    ],
)
def test_which_dialogues_an_sft_run_reads_is_fixed(
    tiny_data: Path, tmp_path: Path, settings: dict[str, Any], told: list[str]
) -> None:
    stored, given = (
        load_config(write_config(tiny_data, tmp_path, **{**sft_settings(tiny_data), **changed}))
        for changed in ({}, settings)
    )
    changes = config_changes(stored, Progress(step=1, consumed_samples=16), given)
    reason = " (which examples there are, and in which order, hangs on it)"
    assert changes.impossible == [line + reason for line in told] and not changes.possible
