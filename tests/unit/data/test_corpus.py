import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder, get_idx_path

from llada_train.config.errors import UserError
from llada_train.data import corpus_writer
from llada_train.data.corpus import Checksums, Corpus, Manifest
from llada_train.data.corpus_writer import CorpusWriter, token_dtype

DOCUMENTS = [[5, 6, 7], [8], [], [65_499, 0, 1, 2]]


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    with CorpusWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "web.v2", DOCUMENTS)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_megatron_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, chunk: int) -> None:
    monkeypatch.setattr(corpus_writer, "CHUNK", chunk)  # the index is written in pieces of any size
    dataset = IndexedDataset(str(write(tmp_path / "c", DOCUMENTS, dtype)))
    assert dataset.index.dtype is dtype
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    prefix = tmp_path / "c"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])  # several sequences, one document
    builder.add_item(torch.tensor([6]))
    builder.end_document()
    builder.add_document(torch.tensor([7, 8]), [1, 1])
    builder.finalize(get_idx_path(str(prefix)))
    corpus = Corpus(prefix)
    assert corpus.dtype == dtype
    assert [corpus.document(i).tolist() for i in range(corpus.num_documents)] == [[1, 2, 3, 4, 5], [6], [7, 8]]
    assert [corpus.document_start(i) for i in range(4)] == [0, 5, 6, 8]
    assert corpus.tokens(0, corpus.num_tokens).tolist() == list(range(1, 9))
    assert corpus.manifest is None


def test_token_dtype_is_megatrons() -> None:
    for vocab_size in (1, 65_499, 65_500, 126_464):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@given(documents=st.lists(st.lists(st.integers(0, 65_535), max_size=5), min_size=1, max_size=20), data=st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject) -> None:
    stream = [token for document in documents for token in document]
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    if not stream:
        with pytest.raises(UserError, match="no tokens"):
            write(prefix, documents)
        return
    corpus = Corpus(write(prefix, documents))
    assert [corpus.document(i).tolist() for i in range(corpus.num_documents)] == documents
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert corpus.tokens(start, stop).tolist() == stream[start:stop]


def test_positions_outside_the_corpus_are_errors(prefix: Path) -> None:
    corpus = Corpus(prefix)
    for start, stop in [(-1, 2), (0, 9), (3, 2)]:
        with pytest.raises(IndexError):
            corpus.tokens(start, stop)
    for document in (-1, 4):
        with pytest.raises(IndexError):
            corpus.document(document)


def test_tokens_cannot_be_changed(prefix: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Corpus(prefix).tokens(0, 2)[0] = 1


@pytest.mark.parametrize("ids", [[-1], [65_536]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit uint16"):
        write(tmp_path / "c", [[1], ids])


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_corpus(prefix: Path) -> None:
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(RuntimeError), CorpusWriter(prefix, np.int32) as writer:
        writer.add_document([1])
        raise RuntimeError
    assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_nothing_has_its_final_name_before_the_end(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        assert all(path.suffix == ".partial" for path in tmp_path.iterdir())


MANIFEST = Manifest(
    documents=4,
    tokens=8,
    text_bytes=30,
    tokenizer_fingerprint="ab",
    vocab_size=65_500,
    dtype="uint16",
    eos_id=1,
    rejected={"empty": 2},
    checksums=Checksums(bin="b", idx="c", inputs="d"),
)


def test_manifest(prefix: Path) -> None:
    MANIFEST.save(prefix)
    assert Corpus(prefix).manifest == MANIFEST
    write(prefix, DOCUMENTS)
    assert Corpus(prefix).manifest is None, "a new corpus must not keep the old manifest"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MANIFEST.model_copy(update={"tokens": 9}).model_dump_json(), "9 tokens, but the corpus has 4 with 8"),
        (json.dumps({"documents": 4}), "tokens: Field required"),
        ("{", "Invalid JSON"),
    ],
)
def test_manifest_faults(prefix: Path, text: str, message: str) -> None:
    Path(f"{prefix}.json").write_text(text)
    with pytest.raises(UserError, match=message):
        _ = Corpus(prefix).manifest


def test_manifests_of_a_pattern(tmp_path: Path) -> None:
    """They are added up; one that was made with another tokenizer is named, though others have none."""
    parts = [tmp_path / f"part-{name}" for name in "abc"]
    for part in parts:
        write(part, DOCUMENTS)
    assert Corpus(tmp_path / "part-*").manifest is None
    MANIFEST.save(parts[0])
    MANIFEST.save(parts[2])
    assert Corpus(tmp_path / "part-*").manifest is None
    assert list(Corpus(tmp_path / "part-*").manifests) == [str(parts[0]), str(parts[2])]
    MANIFEST.save(parts[1])
    both = Corpus(tmp_path / "part-*").manifest
    assert both is not None
    assert (both.documents, both.tokens, both.text_bytes) == (12, 24, 90)
    assert both.made_with == MANIFEST.made_with
    MANIFEST.model_copy(update={"tokenizer_fingerprint": "cd"}).save(parts[2])
    with pytest.raises(UserError, match=r"part-c: was not tokenized like .*part-a"):
        _ = Corpus(tmp_path / "part-*").manifest


def test_a_path_may_have_brackets(tmp_path: Path) -> None:
    (tmp_path / "web[1]").mkdir()
    assert Corpus(write(tmp_path / "web[1]" / "c", DOCUMENTS)).num_documents == 4


def test_a_folder_that_cannot_be_listed_does_not_make_a_smaller_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c", ".hidden"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "corpus", DOCUMENTS)
    assert Corpus(tmp_path / "*" / "corpus").num_documents == Corpus(tmp_path / "[abc]" / "c*s").num_documents == 12
    iterdir = Path.iterdir

    def failing(path: Path) -> Iterator[Path]:
        if path.name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(UserError, match=r"/b: cannot be listed: Input/output error"):
        Corpus(tmp_path / "*" / "corp*")


def test_missing_files_are_named(prefix: Path) -> None:
    with pytest.raises(UserError, match=r"no\.bin and .*no\.idx missing; give the prefix"):
        Corpus(prefix.with_name("no"))
    with pytest.raises(UserError, match=r"give the prefix, .*/web\.v2,"):
        Corpus(Path(f"{prefix}.bin"))
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(UserError, match=r"no corpus: [^ ]*/web\.v2\.idx missing"):
        Corpus(prefix)


def test_every_truncation_of_the_index_is_noticed(prefix: Path) -> None:
    index = Path(f"{prefix}.idx")
    data = index.read_bytes()
    for size in range(len(data)):
        index.write_bytes(data[:size])
        with pytest.raises(UserError, match="truncated" if size >= 9 else "not a Megatron index"):
            Corpus(prefix)


@pytest.mark.parametrize("change", [-1, +1])
def test_a_bin_of_another_size_is_refused(prefix: Path, change: int) -> None:
    path = Path(f"{prefix}.bin")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(UserError, match=rf"has {16 + change} bytes, but .*\.idx describes 16"):
        Corpus(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, b"P", "not a Megatron index"), (9, b"\2", "version 2"), (17, b"\6", "dtype code 6"), (-8, b"\3", "damaged")],
)
def test_a_broken_index_is_refused(prefix: Path, offset: int, value: bytes, message: str) -> None:
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[offset : offset + 1 or None] = value
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        Corpus(prefix)


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "c", DOCUMENTS)


def test_a_removed_corpus_goes_on_being_read(prefix: Path) -> None:
    corpus = Corpus(prefix)
    for path in prefix.parent.iterdir():
        path.unlink()
    assert [corpus.document(i).tolist() for i in range(4)] == DOCUMENTS


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_corpus_that_is_cut_while_it_is_open_is_a_user_error(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}{suffix}")
    corpus, content = Corpus(prefix), path.read_bytes()
    os.truncate(path, len(content) - 9)  # under a memory map, past its last page, that would be SIGBUS
    with pytest.raises(UserError, match=rf"{suffix}: has no byte .* it was cut since it was opened; put the file back"):
        corpus.document(3)
    path.write_bytes(content)
    assert corpus.document(3).tolist() == DOCUMENTS[3]


def test_a_corpus_that_cannot_be_read_any_more_is_a_user_error(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    corpus = Corpus(prefix)
    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(UserError, match=r"web\.v2\.idx: cannot be read any more: Stale file handle"):
        corpus.document(1)
    with pytest.raises(UserError, match=r"web\.v2\.bin: cannot be read any more: Stale file handle"):
        corpus.tokens(0, 1)


def test_short_reads_are_put_together(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, start: pread(descriptor, min(size, 3), start))
    corpus = Corpus(prefix)
    assert [corpus.document(i).tolist() for i in range(4)] == DOCUMENTS


def test_files_are_closed_with_the_last_use(prefix: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    corpora = [Corpus(prefix) for _ in range(3)]
    assert len(set(Path("/proc/self/fd").iterdir()) - before) >= 6
    del corpora
    assert not set(Path("/proc/self/fd").iterdir()) - before
