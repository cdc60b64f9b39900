"""Answers to held-out prompts, by models whose answers are known."""

import math
from pathlib import Path

import pytest
import torch
from conftest import sft_settings, write_config

from llada_train.config.load import load_config
from llada_train.data.sft import SftData
from llada_train.evaluation.answers import answers_report
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.sampling.denoiser import every_position
from llada_train.sampling.plain import PlainDenoiser


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> SftData:
    return SftData(load_config(write_config(tiny_data, tmp_path, **sft_settings(tiny_data))))


def test_a_model_that_knows_the_answers_gives_them_all(data: SftData) -> None:
    """It reads the prompt and has learnt the responses by heart, with EOS after them."""
    known = {}
    for example in data.validation_examples:
        tokens = data.corpora[0].tokens(example.start, example.stop).tolist()
        known[tuple(tokens[: example.responses[0][0]])] = tokens

    def logits(ids: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*ids.shape, 300)
        for b, row in enumerate(ids.tolist()):
            (tokens,) = (tokens for prompt, tokens in known.items() if tuple(row[: len(prompt)]) == prompt)
            tokens = [*tokens, *[data.tokenizer.eos_id] * 64][: len(row)]
            found[b, torch.arange(len(row)), torch.tensor(tokens)] = 100.0
        return found

    report = answers_report(every_position(logits), data)
    assert (report.examples, report.exact_match) == (8, 1.0)
    assert report.bound == pytest.approx(0, abs=1e-6)
    prompt, response, answer = report.samples[0]
    assert response == answer and prompt.strip().startswith("user")


def test_a_model_that_knows_nothing_gives_none_and_its_bound_is_that_of_a_die(data: SftData) -> None:
    """Each masked token costs ln V; over p·L' of them, and t spread evenly, that is the bound, up to chance."""
    report = answers_report(every_position(lambda ids: torch.zeros(*ids.shape, 300)), data)
    assert report.exact_matches == 0
    assert report.bound == pytest.approx(math.log(300), rel=0.5)
    masked = sum(one.loss_weight * one.mask.sum() for one in data.validation_samples(range(8)))
    assert report.bound == pytest.approx(math.log(300) * masked)


def test_batches_change_nothing(data: SftData) -> None:
    """Rows are of many lengths, and padding is not seen."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 32}
    ids = {"mask_token_id": data.tokenizer.mask_id, "eos_token_id": 0, "pad_token_id": 0}
    config = LLaDAConfig(**sizes, **ids, vocab_size=384, max_sequence_length=64)
    denoiser = PlainDenoiser(LLaDAModelLM(config), data.tokenizer.vocab_size)
    alone, together = (answers_report(denoiser, data, batch_size) for batch_size in (1, 8))
    assert together.bound == pytest.approx(alone.bound, rel=1e-5) and together.samples == alone.samples
