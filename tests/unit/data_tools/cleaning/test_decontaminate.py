import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.cleaning.decontaminate import Finder
from data_tools.cleaning.evaluations import Evaluations
from llada_train.config.errors import UserError

WORD = st.sampled_from(["red", "green", "blue", "one", "two"])
TEXT = st.lists(WORD, max_size=12).map(" ".join)
EXAMPLE = st.fixed_dictionaries({"question": TEXT, "choices": st.lists(TEXT, max_size=3), "id": st.integers()})


def runs(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(EXAMPLE, min_size=1, max_size=4), min_size=1, max_size=3), TEXT, st.integers(2, 5))
def test_what_is_shared_is_found(tmp_path: Path, tasks: list[list[dict]], text: str, n: int) -> None:
    paths = [tmp_path / f"task{i}.jsonl" for i in range(len(tasks))]
    for path, examples in zip(paths, tasks, strict=True):
        path.write_text("".join(json.dumps(example) + "\n\n" for example in examples))
    sets = [
        set().union(*(runs(text, n) for text in [example["question"], *example["choices"]]))
        for examples in tasks
        for example in examples
    ]
    if not any(sets):
        with pytest.raises(UserError, match=rf"none of the {len(sets)} evaluation examples has {n} words in a row"):
            Evaluations.read(paths, n)
        return
    evaluations = Evaluations.read(paths, n)
    assert sum(evaluations.examples) == len(sets)
    assert sum(evaluations.too_short) == sum(not ngrams for ngrams in sets)
    [hits] = Finder(evaluations)([f"Und {text.upper()}!".replace(" ", "\n - ")])
    shared = [i for i, ngrams in enumerate(sets) if ngrams & runs(f"und {text}", n)]
    assert (sorted(set(evaluations.example[hits.rows])) if hits else []) == shared
    if hits:
        assert tuple(hits.ngram.split()) in set().union(*sets) & runs(text, n)


def test_formats_and_names_of_tasks(tmp_path: Path) -> None:
    line = b'{"text": "one two three"}\n'
    (tmp_path / "again").mkdir()
    for name, data in {
        "a.jsonl": line,
        "b.jsonl.gz": gzip.compress(line),
        "c.v2.jsonl.zst": zstandard.compress(line),
        "d.txt": b"one two three",
        "again/a.jsonl": line * 2,
    }.items():
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.v2.jsonl.zst", "d.txt", "again/a.jsonl")]
    evaluations = Evaluations.read(paths, 3)
    assert evaluations.tasks == [str(paths[0]), "b", "c.v2", "d", str(paths[-1])]
    assert evaluations.examples == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"te', "a.jsonl, line 2: broken JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl: not valid UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-12], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 100)[:-5], "a.jsonl.zst: cannot be read: truncated"),
        ("a.jsonl.zst", b"not zstandard", "a.jsonl.zst: cannot be read"),
        ("a.txt", b"\xff", "a.txt: not valid UTF-8"),
        ("a.parquet", b"", "a.parquet: --against has to end in"),
        ("a.jsonl", b"", "none of the 0 evaluation examples"),
    ],
)
def test_faulty_evaluations_are_told(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        Evaluations.read([tmp_path / name], 2)
