from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data.corpus import Corpus
from llada_train.data.corpus_writer import CorpusWriter
from llada_train.data.rows import PretrainingData
from llada_train.data.tokenizer import Tokenizer

S = 8


def write(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    """A corpus without a manifest, as Megatron's tools leave it."""
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


@pytest.fixture
def opened(make_config: Callable[..., Path]) -> Callable[..., PretrainingData]:
    """`opened(corpora, key__name=value, …)`: the data of a config with rows of 8 tokens."""

    def build(corpora: list[dict[str, Any]] | None = None, **overrides: Any) -> PretrainingData:
        if corpora is not None:
            overrides["data__corpora"] = corpora
        return PretrainingData(load_config(make_config(**{"data__sequence_length": S, **overrides})))

    return build


def test_an_epoch_is_the_stream_cut_into_rows(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    stream = np.arange(100)  # 12 rows of 8; 4 tokens are left out
    data = opened([{"path": write(tmp_path / "c", [stream[:3], stream[3:3], stream[3:50], stream[50:]])}])
    assert data.blocks_per_corpus == [12]
    first, second = (data.training_rows(np.arange(12) + 12 * epoch) for epoch in (0, 1))
    assert first.dtype == np.int64
    for rows in (first, second):
        assert np.array_equal(rows[np.argsort(rows[:, 0])], stream[:96].reshape(12, 8))
    assert not np.array_equal(first, second)
    assert np.array_equal(data.training_rows(np.array([15, 3])), np.stack([second[3], first[3]]))


def test_rows_of_other_lengths_walk_through_the_same_blocks(
    opened: Callable[..., PretrainingData], tmp_path: Path
) -> None:
    """12 blocks of 16: one step of 4 × 8 tokens, then steps of 2 × 16, then of 8 × 4; the tokens are the same."""
    path = write(tmp_path / "c", [np.arange(200)])
    schedule = [
        {"from_tokens": 1, "sequence_length": 16, "global_batch_size": 2},
        {"from_tokens": 90, "sequence_length": 4, "global_batch_size": 8},
    ]
    settings = {"training__global_batch_size": 4, "data__block_length": 16}
    changing = opened([{"path": path}], schedule=schedule, **settings)
    assert changing.blocks_per_corpus == [12]
    parts = [changing.training_rows(np.arange(*ends)) for ends in [(0, 4), (4, 8), (8, 8 + 24)]]
    assert [part.shape for part in parts] == [(4, 8), (4, 16), (24, 4)]
    tokens = np.concatenate([part.ravel() for part in parts])
    assert np.array_equal(np.sort(tokens), np.arange(192))
    constant = opened([{"path": path}], **settings)
    assert np.array_equal(tokens, constant.training_rows(np.arange(24)).ravel())
    assert np.array_equal(constant.at(changing.timeline).training_rows(np.arange(8, 32)), parts[2])
    assert np.array_equal(tokens, changing.training_blocks(np.arange(12)).ravel())


def test_corpora_come_by_weight(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [[1] * 80]), write(tmp_path / "b", [[2] * 800])
    data = opened([{"path": a, "weight": 3.0}, {"path": b, "weight": 1.0}])
    assert (data.training_rows(np.arange(400)) == 1).all(axis=1).sum() == 300


def test_every_document_keeps_its_eos(opened: Callable[..., PretrainingData], tiny_data: Path) -> None:
    data, corpus = opened(), Corpus(tiny_data / "corpus")
    eos = Tokenizer.load(tiny_data / "tokenizer").eos_id
    border = corpus.document_start(280)
    rows = data.training_rows(np.arange(border // S))
    missing = border % S and corpus.tokens(border - border % S, border).tolist().count(eos)
    assert (rows == eos).sum() == 280 - missing


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=2, max_size=12), split=st.data())
def test_held_out_documents_are_never_trained_on(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, lengths: list[int], split: st.DataObject
) -> None:
    from conftest import write_config

    held_out = split.draw(st.integers(1, len(lengths) - 1))
    # Training tokens are 1, held-out tokens 2.
    documents = [[1] * n for n in lengths[:-held_out]] + [[2] * n for n in lengths[-held_out:]]
    training, validation = sum(lengths[:-held_out]), sum(lengths[-held_out:])
    folder = tmp_path_factory.mktemp("c")
    assume(training + validation)
    corpora = [{"path": write(folder / "c", documents), "validation_documents": held_out}]
    config = load_config(write_config(tiny_data, folder, data__sequence_length=S, data__corpora=corpora))
    if min(training, validation) < S:
        with pytest.raises(UserError, match="less than one row"):
            PretrainingData(config)
        return
    data = PretrainingData(config)
    assert data.blocks_per_corpus == [training // S]
    assert np.all(data.training_rows(np.arange(3 * (training // S))) == 1)
    assert data.validation_rows.shape == (min(8, validation // S), S)
    assert np.all(data.validation_rows == 2)


def test_validation_rows_are_spread_over_corpora_and_rows(
    opened: Callable[..., PretrainingData], tmp_path: Path
) -> None:
    corpora = []
    for c, rows in enumerate([50, 1, 4]):
        held_out = np.repeat(np.arange(rows), S) + 100 * c  # row r of corpus c is all 100·c + r
        path = write(tmp_path / f"c{c}", [[0] * S, held_out])
        corpora.append({"path": path, "validation_documents": 1})
    few = opened(corpora, validation__sequences=9).validation_rows
    assert sorted(few[:, 0]) == [0, 12, 25, 37, 100, 200, 201, 202, 203]
    every = opened(corpora, validation__sequences=1000).validation_rows
    assert sorted(every[:, 0]) == [*range(50), 100, *range(200, 204)]


def test_without_held_out_documents_validation_is_off(opened: Callable[..., PretrainingData], tiny_data: Path) -> None:
    assert opened([{"path": str(tiny_data / "corpus")}]).validation_rows.shape == (0, S)


def test_corpus_of_another_tokenizer_is_refused(opened: Callable[..., PretrainingData], tiny_data: Path) -> None:
    other = tiny_data.parent / f"{tiny_data.name}-other"
    other.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((tiny_data / "tokenizer" / name).read_bytes())
    (other / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match=rf"corpus: was not tokenized with {other}.*set data.tokenizer to the folder"):
        opened(data__tokenizer=str(other))


def test_model_vocabulary_smaller_than_the_tokenizers_is_refused(opened: Callable[..., PretrainingData]) -> None:
    with pytest.raises(UserError, match=r"model.vocab_size 256 is too small: .*tokenizer has \d+ ids"):
        opened(model__vocab_size=256)


def test_ids_beyond_the_model_are_refused_when_opened(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    path = write(tmp_path / "c", [[5] * 20, [300] * 20])
    with pytest.raises(UserError, match=f"{path}: holds token id 300, but model.vocab_size is 300"):
        opened([{"path": path}]).check()


def test_ids_beyond_the_model_are_refused_when_read(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    stream = np.ones(10_000 * S, int)
    stream[1500] = 999  # at a place that is not looked at when the corpus is opened
    data = opened([{"path": write(tmp_path / "c", [stream])}])
    with pytest.raises(UserError, match="holds token id 999"):
        data.training_rows(np.arange(10_000))


@pytest.mark.parametrize(
    ("documents", "held_out", "message"),
    [
        ([[1] * 99] * 3, 3, "validation_documents 3 leaves nothing to train on: the corpus has 3 documents"),
        ([[1] * 99] * 3, 4, "validation_documents 4 leaves nothing to train on"),
        ([[1] * 7], 0, "the 1 training documents have 7 tokens, less than one row of data.sequence_length 8"),
        ([[1] * 7, [1] * 99], 1, "the 1 training documents have 7 tokens"),
        ([[1] * 99, [1] * 3, [1] * 4], 2, "the 2 held-out documents have 7 tokens.*raise validation_documents"),
    ],
)
def test_too_little_data_is_refused(
    opened: Callable[..., PretrainingData], tmp_path: Path, documents: list[list[int]], held_out: int, message: str
) -> None:
    path = write(tmp_path / "c", documents)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        opened([{"path": path, "validation_documents": held_out}])


def test_a_corpus_of_less_than_a_block_is_refused(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    path = write(tmp_path / "c", [[1] * 15])
    with pytest.raises(UserError, match=r"15 tokens, less than one block of data.block_length 16; use a larger corpus"):
        opened([{"path": path}], data__block_length=16)


def test_missing_corpus_is_refused(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.bin"):
        opened([{"path": str(tmp_path / "nowhere")}])
