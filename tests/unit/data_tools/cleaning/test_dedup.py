import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_tools.cleaning.dedup import deduplicate, join_equal
from data_tools.cleaning.minhash import Signer
from data_tools.cleaning.report import Report
from data_tools.sources import Document, Sources
from llada_train.config.errors import UserError


def dedup(lines: list[str], folder: Path, signer: Signer, workers: int = 1, samples: int = 2) -> Report:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    report = Report(command="dedup", inputs=[], settings={})
    sources = Sources([folder / "in.jsonl"])
    deduplicate(sources, folder / "out.jsonl", signer, report, samples, workers, lambda done, note: None)
    return report


def kept(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (20, 5)])
def test_near_duplicates_are_found_as_often_as_stated(bands: int, rows: int) -> None:
    signer = Signer(2, bands, rows)
    pick, pairs = random.Random(0), 400
    for shared, apart in [(100, 100), (100, 50), (120, 40), (120, 30), (180, 20)]:
        similarity = shared / (shared + apart)  # of the sets of word pairs below
        texts = []
        for i in range(pairs):
            words = [f"{i}x{j}" for j in range(shared + 1 + apart // 2)]
            for side in "ab":
                # A chain of `shared` pairs of words that both have, and apart/2 pairs of its own.
                texts.append(" ".join(words[: shared + 1] + [f"{side}{word}" for word in words[shared + 1 :]]))
        pick.shuffle(order := list(range(len(texts))))
        keys = np.empty((len(texts), 1 + bands), np.uint64)
        keys[order] = np.stack(signer([texts[i] for i in order]))
        found = (keys[0::2, 1:] == keys[1::2, 1:]).any(axis=1).mean()
        expected = 1 - (1 - similarity**rows) ** bands
        assert signer.probability(similarity) == pytest.approx(expected)
        assert found == pytest.approx(expected, abs=4 * (max(expected * (1 - expected), 0.001) / pairs) ** 0.5)


@given(arrays.arrays(np.uint64, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(0, 12)))
def test_sets_are_the_connected_components(columns: np.ndarray) -> None:
    count = columns.shape[1]
    first = np.arange(count)
    for keys in columns:
        join_equal(first, keys)
    pairs = [(i, j) for keys in columns for i in range(count) for j in range(i) if keys[i] == keys[j] and keys[i] != 0]
    i, j = np.array(pairs, dtype=int).reshape(-1, 2).T
    _, labels = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(count, count)), directed=False)
    assert first.tolist() == [int(np.flatnonzero(labels == label)[0]) for label in labels]


def test_the_first_is_kept(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(200)]
    text = " ".join(words)
    near = " ".join(["another", *words[1:-1], "end"])
    texts = ["short", text, "a  short one", "short", near, " ".join(words[:60]), f"{text}\n", "a short\tone", "Short"]
    report = dedup(texts, tmp_path, Signer(5, 14, 8))
    assert kept(tmp_path) == ["short", text, "a  short one", " ".join(words[:60]), "Short"]
    assert {rule: removed.documents for rule, removed in report.removed.items()} == {"exact": 3, "near": 1}
    [pair] = report.removed["near"].samples
    assert (pair.document, pair.text[:7], (pair.other_text or "")[:5]) == (4, "another", "w0 w1")
    assert pair.why == "Jaccard similarity 0.98 with document 1"  # 194 of 198 runs of five words
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["kept_documents"] == 5


def test_exact_only(tmp_path: Path) -> None:
    text = " ".join(f"w{i}" for i in range(200))
    report = dedup([text, f"{text} more", f" {text}"], tmp_path, Signer(5, 0, 8))
    assert kept(tmp_path) == [text, f"{text} more"]
    assert list(report.removed) == ["exact"]


def test_the_output_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.workers.BATCH_BYTES", 500)
    monkeypatch.setattr("data_tools.cleaning.dedup.BLOCK", 7)
    pick = random.Random(0)
    bases = [[f"{i}w{j}" for j in range(60)] for i in range(10)]
    texts = []
    for _ in range(100):
        words = list(pick.choice(bases))
        words[pick.randrange(60)] = "changed"
        texts.append(" ".join(words))
    outputs = []
    for workers in (1, 2):
        report = dedup(texts, tmp_path, Signer(3, 14, 8), workers)
        outputs.append((kept(tmp_path), report.model_dump()))
    assert outputs[0] == outputs[1]
    assert 10 <= len(outputs[0][0]) < 100


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    class ChangesAfterOnePass(Sources):
        def __iter__(self) -> Iterator[Document]:
            yield from super().__iter__()
            (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "six"}\n')

    sources = ChangesAfterOnePass([tmp_path / "in.jsonl"])
    report = Report(command="dedup", inputs=[], settings={})
    with pytest.raises(UserError, match="the input changed"):
        deduplicate(sources, tmp_path / "out.jsonl", Signer(5, 14, 8), report, 1, 1, lambda done, note: None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
