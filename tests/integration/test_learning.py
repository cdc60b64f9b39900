"""What the commands train really learns: a source of known entropy to its limit, and one sentence by heart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from conftest import write_config
from typer.testing import CliRunner

from data_tools.cli import app as data_app
from llada_train.config.load import load_config
from llada_train.data.corpus_writer import CorpusWriter
from llada_train.data.tokenizer import EOS_TOKEN, MASK_TOKEN, Tokenizer

SYMBOLS = "abcdefgh"
ROW = 8
HELD_OUT_ROWS = 16_384
SENTENCE = "Every row of this corpus is the same sentence, and a model of any size can learn it by heart."
LAST_WORD = " heart."

Command = Callable[..., Any]


class MarkovSource:
    """A first-order Markov chain over SYMBOLS, started in its stationary distribution."""

    def __init__(self, seed: int) -> None:
        self.pick = np.random.default_rng(seed)
        self.transition = self.pick.dirichlet(np.full(len(SYMBOLS), 0.3), size=len(SYMBOLS))
        values, vectors = np.linalg.eig(self.transition.T)
        stationary = np.real(vectors[:, np.argmin(np.abs(values - 1))])
        self.stationary = stationary / stationary.sum()

    def rows(self, count: int) -> np.ndarray:
        """[count, ROW] symbols, one independent chain in each row."""
        rows = np.empty((count, ROW), np.int64)
        rows[:, 0] = self.pick.choice(len(SYMBOLS), size=count, p=self.stationary)
        cumulative = self.transition.cumsum(1)
        for i in range(1, ROW):
            rows[:, i] = (self.pick.random((count, 1)) > cumulative[rows[:, i - 1]]).sum(1).clip(0, len(SYMBOLS) - 1)
        return rows

    @property
    def entropy(self) -> float:
        """Of a row, in nats per token: (H(π) + (ROW − 1)·Σ_a π_a·H(P_a)) / ROW."""
        rate = float(self.stationary @ _entropy(self.transition))
        return (self.unigram_entropy + (ROW - 1) * rate) / ROW

    @property
    def unigram_entropy(self) -> float:
        return float(_entropy(self.stationary))


def _entropy(p: np.ndarray) -> Any:
    return -np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0).sum(-1)


def symbol_tokenizer(folder: Path) -> None:
    vocabulary = {symbol: i for i, symbol in enumerate([*SYMBOLS, EOS_TOKEN, MASK_TOKEN, "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN, "mask_token": MASK_TOKEN}))


def training(sequence_length: int, batch: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Settings of a short run over rows of `sequence_length`: a tenth of it warm-up, then down to a twentieth."""
    tokens = steps * batch * sequence_length
    return {
        "model__num_layers": 2,
        "model__ffn_hidden_size": 192,
        "data__sequence_length": sequence_length,
        "objective": {"t_sampling": "stratified"},
        "optimizer": {
            "learning_rate": [
                {"until_tokens": tokens // 10, "end": learning_rate},
                {"until_tokens": tokens, "end": learning_rate / 20},
            ],
            "weight_decay": 0.0,
        },
        "training__global_batch_size": batch,
        "checkpoint__interval_steps": 10_000,
        "validation__interval_steps": 10_000,
        "logging__interval_steps": 100,
    }


def test_the_bound_reaches_the_entropy_of_a_markov_source_and_never_passes_it(
    tmp_path: Path, run_command: Command
) -> None:
    """Eq. 4: the bound is an upper bound on −log p, whose mean is at least the source's entropy."""
    source = MarkovSource(seed=1)
    assert source.entropy < 0.7 * source.unigram_entropy  # most of what there is to learn is in the context
    symbol_tokenizer(tmp_path / "tokenizer")
    # Two documents, cut into whole rows; what ends them is left over.
    with CorpusWriter(tmp_path / "corpus", np.uint16) as corpus:
        for rows in (100_000, HELD_OUT_ROWS):
            corpus.add_document([*source.rows(rows).ravel(), len(SYMBOLS)])
    config = write_config(
        tmp_path,
        tmp_path,
        data__corpora=[{"path": str(tmp_path / "corpus"), "validation_documents": 1}],
        validation__sequences=HELD_OUT_ROWS,
        training__micro_batch_size=128,
        **training(ROW, batch=128, steps=600, learning_rate=3e-3),
    )
    trained = run_command("llada_train.cli", "pretrain", config)
    assert trained.returncode == 0, trained.stderr
    evaluated = run_command("llada_train.cli", "evaluate", "--json", load_config(config).run_dir)
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads(evaluated.stdout)
    bound, error = report["bound"]["nats_per_token"], report["bound_standard_error"]
    assert error < 0.01 * source.entropy
    assert source.entropy - 3 * error <= bound <= 1.05 * source.entropy
    assert report["bigram"]["nats_per_token"] == pytest.approx(source.entropy, rel=0.02)
    assert report["unigram"]["nats_per_token"] == pytest.approx(source.unigram_entropy, rel=0.01)


def test_one_sentence_is_learnt_by_heart(tmp_path: Path, run_command: Command) -> None:
    """Text to tokens to a model to text, by the commands alone; from the first word, and from the last."""
    text, tokenizer = tmp_path / "text.jsonl", tmp_path / "tokenizer"
    text.write_text((json.dumps({"text": SENTENCE}) + "\n") * 300)
    for command in (
        ["train-tokenizer", text, "--vocab-size", "300", "--output", tokenizer],
        ["tokenize", text, "--tokenizer", tokenizer, "--output", tmp_path / "corpus"],
    ):
        done = CliRunner().invoke(data_app, [str(argument) for argument in command])
        assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "corpus.json").read_text())
    length = manifest["tokens"] // manifest["documents"]  # the sentence and its end-of-text: every row is the same
    config = write_config(
        tmp_path,
        tmp_path,
        data__corpora=[{"path": str(tmp_path / "corpus")}],
        training__micro_batch_size=16,
        **training(length, batch=32, steps=150, learning_rate=5e-3),
    )
    trained = run_command("llada_train.cli", "pretrain", config, "--processes", "2")
    assert trained.returncode == 0, trained.stderr
    run = load_config(config).run_dir
    # Not from masks alone: rotary embeddings know distances only, so one known token has to say where the others stand.
    continued = run_command("llada_train.cli", "sample", run, "--prompt", "Every", "--gen-length", length)
    assert continued.stdout == f"{SENTENCE}\n", continued.stderr
    missing = MASK_TOKEN * len(Tokenizer.load(tokenizer).encode_batch([SENTENCE.removesuffix(LAST_WORD)])[0])
    filled = run_command("llada_train.cli", "sample", run, "--infill", missing + LAST_WORD)
    assert filled.stdout == f"{SENTENCE}\n", filled.stderr
