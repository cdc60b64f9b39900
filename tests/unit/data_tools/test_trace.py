"""What trace says of a step is what the loader reads in it; what it finds is what a look at every step finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import record_checkpoint

from data_tools.trace import find, open_run, place, trace
from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.data.loader import TrainingLoader
from llada_train.data.rows import PretrainingData

SCHEDULE = [{"from_tokens": 1000, "global_batch_size": 8}, {"from_tokens": 2000, "sequence_length": 16}]


@pytest.fixture
def run(make_config: Callable[..., Path], tiny_data: Path, tmp_path: Path) -> Callable[..., tuple[Config, Any]]:
    """The data of a small run of two corpora, of three epochs of the smaller one, with changes on the way."""
    from data_tools.sources import Sources
    from data_tools.tokenize import tokenize

    (tmp_path / "small.txt").write_text("the king of the hill was his")
    words = " ".join(["they was his"] * 100)
    (tmp_path / "more.txt").write_text(words)
    tokenize(Sources([tmp_path / "small.txt", tmp_path / "more.txt"]), tiny_data / "tokenizer", tmp_path / "small")

    def build(**overrides: Any) -> tuple[Config, PretrainingData]:
        corpora = [
            {"path": str(tiny_data / "corpus"), "validation_documents": 20, "weight": 2},
            {"path": str(tmp_path / "small")},
        ]
        return open_run(make_config(data__corpora=corpora, **{"schedule": SCHEDULE, **overrides}))

    return build


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_a_traced_step_is_what_the_loader_reads(run: Callable[..., Any], rank: int | None) -> None:
    config, data = run(objective={"random_length_probability": 0.5}, parallel={"tensor_parallel": 2})
    where = place(config, rank, None if rank is None else 4)
    loader = TrainingLoader(data, config, where)
    eos = data.tokenizer.eos_id
    for step in (1, 4, 12, 16):
        rows = list(trace(config, data, step, where))
        batches = loader.global_batch(data.timeline.first_sample(step))
        assert [row.sample for row in rows] == [i for batch in batches for i in batch.sample_index.tolist()]
        assert [row.t for row in rows] == pytest.approx([t for batch in batches for t in batch.t.tolist()])
        masked = sum(int((batch.loss_weight > 0).sum()) for batch in batches)
        assert sum(row.masked for row in rows) == masked > 0
        for row, clean in zip(rows, data.training_rows([row.sample for row in rows]), strict=True):
            assert row.text == data.tokenizer.decode(clean[: row.length].tolist(), keep_special=True)
            corpus = data.corpora[data.names.index(row.corpus)]
            parts = [
                corpus.document(part.number)[part.first_token : part.first_token + part.tokens]
                for part in row.documents
            ]
            assert np.array_equal(np.concatenate(parts), clean[: row.length])
            assert all(part[-1] == eos for part in parts[:-1])


def test_ranks_are_named_as_they_are_started(run: Callable[..., Any]) -> None:
    config, _ = run(parallel={"tensor_parallel": 2})
    assert [place(config, rank, 8).data_parallel_rank for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UserError, match="--rank 8: the ranks of 8 processes are 0 to 7"):
        place(config, 8, 8)


@pytest.mark.parametrize("text", ["king of the hill", "they was his", "his", "is w", "of", "end", "text"])
@pytest.mark.parametrize("goes_back", [False, True])
def test_what_is_found_is_what_every_step_shows(run: Callable[..., Any], text: str, goes_back: bool) -> None:
    config, data = run(objective={"random_length_probability": 0.5})
    if goes_back:  # the samples of two steps are passed over
        first = data.timeline.first_sample(3)
        data = data.at(data.timeline.passing_over(first, first + 32))
    uses: dict[tuple[str, int], set[int]] = {}
    last = data.timeline.step(data.timeline.end_samples - 1)
    for step in range(1, last + 1):
        for row in trace(config, data, step):
            for part in row.documents:
                uses.setdefault((row.corpus, part.number), set()).add(step)
    expected = []
    for c, corpus in enumerate(data.corpora):
        for i in range(corpus.num_documents):
            if text in data.tokenizer.decode(corpus.document(i)[:-1].tolist()):
                name, held_out = data.names[c], i >= data.trained_documents(c)
                expected.append((name, i, held_out, sorted(uses.get((name, i), ()))))
                assert not (held_out and expected[-1][-1])
    found = [(use.corpus, use.document, use.held_out, use.steps) for use in find(config, data, text)]
    assert found == expected
    assert bool(found) == (text not in ("end", "text"))  # which are in the name of the token between documents


def test_a_text_is_found_across_the_pieces_that_are_searched(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = run()
    whole = list(find(config, data, "they was his they"))
    for chunk in (1, 7, 64):
        monkeypatch.setattr("data_tools.trace.CHUNK", chunk)
        assert list(find(config, data, "they was his they")) == whole


def test_the_command(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from data_tools import cli

    def trace_command(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["llada-data", "trace", str(tmp_path / "config.yaml"), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    config, data = run()
    code, out, _ = trace_command("--step", "2")
    assert code == 0 and "step 2: 16 of 16 samples of at most 32 tokens, from 512 nominal tokens on" in out
    code, out, _ = trace_command("--step", "2", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["sample"] for row in rows] == list(range(16, 32))
    assert rows[0]["text"] == next(trace(config, data, 2)).text
    code, out, _ = trace_command("--find", "king of the hill")
    assert code == 0 and out.startswith("small, document 0 (") and "steps " in out
    code, _, err = trace_command("--find", "no such words")
    assert code == 1 and "no document of 2 corpora holds 'no such words'" in err
    code, _, err = trace_command("--step", "900")
    assert code == 2 and "--step 900: the run has the steps 1 to " in err
    code, _, err = trace_command("--step", "1", "--rank", "0", "--processes", "3")
    assert code == 2 and "16 is not a multiple of micro_batch_size 2 × data-parallel 3" in err
    for arguments in (["--step", "1", "--rank", "0"], ["--find", "his", "--rank", "0", "--processes", "2"]):
        code, _, err = trace_command(*arguments)
        assert code == 2 and "--rank and --processes say together whose rows" in err
    code, _, err = trace_command()
    assert code == 2 and "give either --step N or --find TEXT" in err


def test_a_run_is_followed_as_its_checkpoint_recorded_it(run: Callable[..., Any]) -> None:
    """A batch size that was changed by hand holds for the steps after it."""
    config, data = run()
    record_checkpoint(config, data, steps=2)
    config, data = run(training__global_batch_size=4, schedule=[])
    assert [len(list(trace(config, data, step))) for step in (1, 2, 3)] == [16, 16, 4]
    with pytest.raises(UserError, match="seed: 1234 → 99"):
        run(seed=99)


def test_a_corpus_that_is_not_the_runs_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    config, data = run()
    record_checkpoint(config, data, steps=2)
    stored = tmp_path / "small.bin"
    content = stored.read_bytes()
    stored.write_bytes(content[2:] + content[:2])
    with pytest.raises(UserError, match=r"small: not the corpus that the run in .*as large as before"):
        open_run(tmp_path / "config.yaml")
