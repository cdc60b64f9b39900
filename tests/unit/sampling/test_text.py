from pathlib import Path

import pytest
import torch
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import Tokenizer
from llada_train.sampling.sampler import SamplingOptions
from llada_train.sampling.text import complete_text, continue_text


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer.load(tiny_data / "tokenizer")


def always(*best: int, vocab: int) -> object:
    """A model that is sure of best[i] at position i, whatever it reads."""

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, vocab)
        for position, token in enumerate(best):
            out[:, position, token] = 10.0
        return out

    return logits


def test_each_mask_token_in_the_text_is_filled_in_and_the_rest_stays(tokenizer: Tokenizer) -> None:
    wanted = tokenizer.encode_batch(["the of and"])[0]
    first, last = tokenizer.decode(wanted[:1]), tokenizer.decode(wanted[2:])
    text = f"{first}<|mdm_mask|>{last}"
    found = complete_text(always(*wanted, vocab=tokenizer.vocab_size), tokenizer, text, SamplingOptions(steps=1))
    assert found == tokenizer.decode(wanted)


def test_a_text_without_masks_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no <\|mdm_mask\|>"):
        complete_text(always(vocab=tokenizer.vocab_size), tokenizer, "the", SamplingOptions(steps=1))


def test_a_continuation_ends_at_the_first_end_of_text(tokenizer: Tokenizer) -> None:
    prompt, word = tokenizer.encode_batch(["the"])[0], tokenizer.encode_batch([" of"])[0]
    answer = [*prompt, *word, tokenizer.eos_id, *word]
    model = always(*answer, vocab=tokenizer.vocab_size)
    length = len(answer) - len(prompt)
    assert continue_text(model, tokenizer, "the", length, SamplingOptions(steps=length)) == "the of"
