"""A model that is split over processes writes and scores as the exported one does on one process."""

from pathlib import Path
from typing import Any

import asked
import processes
import pytest
from conftest import write_config
from hf_folders import checkpoint, export, released_folder

from llada_train.config.schema import ModelConfig
from llada_train.convert.load import loaded

SIZES = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 48, "vocab_size": 300, "num_heads": 4}


@pytest.fixture(scope="module")
def saved(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that two tensor-parallel ranks saved."""
    processes.start()
    folder = tmp_path_factory.mktemp("split") / "step-00000001"
    checkpoint(folder, ModelConfig(**SIZES, num_kv_heads=2), tiny_data / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, Any]:
    export(saved, saved.parent / "hf", "fp32")
    with loaded(saved.parent / "hf") as whole:
        found = asked.answers(whole)
    assert len({str(found[name]) for name in asked.WAYS}) == len(asked.WAYS)
    return found


@pytest.mark.parametrize(
    ("count", "parallel"),
    [
        (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        (4, {"tensor_parallel": 2, "sequence_parallel": True}),
    ],
    ids=["TP2-PP2", "DP2-TP2-SP"],
)
def test_a_split_model_answers_as_the_exported_one(
    saved: Path, expected: dict[str, Any], count: int, parallel: dict[str, int | bool]
) -> None:
    first, *others = processes.run(count, asked.ask, saved, parallel)
    assert not any(others)
    for name, value in expected.items():
        if name.startswith(("likelihoods", "bound")):
            assert first[name] == pytest.approx(value, abs=1e-5), name
        else:
            assert first[name] == value, name


def test_a_released_model_is_split_as_it_is(tmp_path: Path) -> None:
    released_folder(tmp_path / "hf")
    with loaded(tmp_path / "hf") as whole:
        expected = asked.drawn(whole)
    assert processes.run(2, asked.ask, tmp_path / "hf", {"pipeline_parallel": 2}, asked.drawn) == [expected, None]


def test_ranks_take_what_rank_0_found_and_are_refused_together(saved: Path, expected: dict[str, Any]) -> None:
    """A run that goes on may save a checkpoint between the looks of two ranks."""
    found = processes.run(2, asked.ask_what_rank_0_found, saved, {"tensor_parallel": 2})
    assert found == [expected["drawn"], None]
    assert processes.run(2, asked.refusal, saved, {}) == ["refused", "refused"]


def test_texts_on_the_way_take_no_more_rows_at_once_than_training(tiny_data: Path, tmp_path: Path) -> None:
    """Under ZeRO 3 and in stages, before the first step, and the same ones."""
    config = write_config(tiny_data, tmp_path, training__micro_batch_size=2)
    layouts = (["parallel.zero_stage=3"], ["parallel.pipeline_parallel=2"])
    in_layouts = [processes.run(2, asked.texts_on_the_way, config, layout) for layout in layouts]
    (texts, _), *_ = in_layouts[0]
    assert texts is not None and len({text for _, text in texts}) > 1
    assert in_layouts == [[(texts, 2), (None, 2)]] * 2
