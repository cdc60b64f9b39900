import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_idx_path

from data_tools.train_tokenizer import train_tokenizer
from data_tools.verify import add_eos, length_histogram, samples, verify
from llada_train.config.errors import UserError
from llada_train.data import indexed
from llada_train.data.corpus import Corpus
from llada_train.data.corpus_writer import CorpusWriter
from llada_train.data.tokenizer import Tokenizer

EOS = 1  # of tiny_data's tokenizer, which has 300 ids


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora of tests span several."""
    for module in ("data_tools.verify", "llada_train.data.indexed", "llada_train.data.corpus_writer"):
        monkeypatch.setattr(f"{module}.CHUNK", 7)


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(tiny_data / "tokenizer")
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (EOS, 300)
    return tokenizer


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def test_a_sound_corpus_has_no_faults(tiny_data: Path, tokenizer: Tokenizer) -> None:
    read = []
    assert not list(verify(Corpus(tiny_data / "corpus"), None, read.append))
    assert sum(read) == (tiny_data / "corpus.bin").stat().st_size
    assert not list(verify(Corpus(tiny_data / "corpus"), tokenizer))


DOCUMENT = st.lists(st.integers(0, 310), max_size=9)


@settings(max_examples=60)
@given(documents=st.lists(DOCUMENT | DOCUMENT.map(lambda document: [*document, EOS]), min_size=1, max_size=30))
def test_faults_are_counted(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, documents: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("c")
    if not any(documents):
        return
    found = "\n".join(verify(Corpus(write(folder / "c", documents)), tokenizer))
    outside = [(token, place) for place, token in enumerate(chain.from_iterable(documents)) if token >= 300]
    counts = {
        "ids are not below 300": len(outside),
        "documents are empty": documents.count([]),
        "documents do not end in EOS": sum(document[-1] != EOS for document in documents if document),
        "EOS are inside documents": sum(document[:-1].count(EOS) for document in documents),
    }
    for what, count in counts.items():
        assert re.findall(rf"^{folder}/c: (\d+) .*{what}", found, re.MULTILINE) == ([str(count)] if count else []), what
    if outside:
        assert f"the first is {outside[0][0]}, token {outside[0][1]}" in found
        with pytest.raises(UserError, match="give the one it was made with"):
            add_eos(folder / "c", folder / "new", tokenizer)
        return
    lacking = sum(document[-1] != EOS for document in documents if document)
    assert add_eos(folder / "c", folder / "new", tokenizer) == lacking
    corpus = Corpus(folder / "new")
    assert [corpus.document(i).tolist() for i in range(corpus.num_documents)] == [
        document if document[-1] == EOS else [*document, EOS] for document in documents if document
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p, ".bin", 50), r"corpus\.bin: its sha256 is [0-9a-f]{64}, but was"),
        (lambda p: flip(p, ".idx", indexed.HEADER.size + 300 * 4 + 8 * 20), "do not lie one after another"),
        (lambda p: flip(p, ".idx", indexed.HEADER.size + 4), "do not lie one after another"),
        (lambda p: flip(p, ".idx", indexed.HEADER.size + 300 * 12 + 8 * 20 + 1), "documents are not in order"),
    ],
)
def test_damage_is_named(tiny_data: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    prefix = tmp_path / "corpus"
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{prefix}{suffix}").write_bytes(Path(f"{tiny_data / 'corpus'}{suffix}").read_bytes())
    damage(prefix)
    assert re.search(message, "\n".join(verify(Corpus(prefix), None)))


def flip(prefix: Path, suffix: str, place: int) -> None:
    path = Path(f"{prefix}{suffix}")
    data = bytearray(path.read_bytes())
    data[place] ^= 2
    path.write_bytes(data)


def test_what_to_compare_with(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest .* give its --tokenizer"):
        list(verify(Corpus(write(tmp_path / "c", [[5, EOS]])), None))
    other = train_tokenizer(iter(["another"]), 280, tmp_path / "t")
    with pytest.raises(UserError, match="was made with another tokenizer"):
        list(verify(Corpus(tiny_data / "corpus"), other))


def test_corpora_of_megatron(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Several sequences may be one document."""
    builder = IndexedDatasetBuilder(f"{tmp_path / 'c'}.bin", dtype=np.uint16)
    for i in range(20):
        builder.add_document(torch.tensor([5] * (i + 3) + [EOS]), [2, i + 2])
    builder.finalize(get_idx_path(str(tmp_path / "c")))
    assert not list(verify(Corpus(tmp_path / "c"), tokenizer))
    assert length_histogram(Corpus(tmp_path / "c")) == [(4, 1, 4), (8, 4, 26), (16, 8, 100), (32, 7, 140)]


def test_what_is_in_it(tiny_data: Path, tokenizer: Tokenizer) -> None:
    corpus = Corpus(tiny_data / "corpus")
    rows = length_histogram(corpus)
    assert sum(documents for _, documents, _ in rows) == corpus.num_documents
    assert sum(tokens for _, _, tokens in rows) == corpus.num_tokens
    shown = samples(corpus, tokenizer, 3, 10_000)
    assert [number for number, _ in shown] == [0, 100, 200]
    assert shown[1][1] == (tiny_data / "text" / "0100.txt").read_text() + "<|endoftext|>"
    assert samples(corpus, tokenizer, 1, 2)[0][1].endswith(" …")
