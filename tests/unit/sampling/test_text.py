from pathlib import Path

import pytest
import torch
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import MASK_TOKEN, Tokenizer
from llada_train.sampling.denoiser import Denoiser, every_position
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import continue_prompts, fill_rows, with_masks


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer.load(tiny_data / "tokenizer")


def always(*best: int, vocab: int) -> Denoiser:
    """A model that is sure of best[i] at position i, whatever it reads."""

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, vocab)
        for position, token in enumerate(best):
            out[:, position, token] = 10.0
        return out

    return every_position(logits)


def test_each_mask_token_in_the_text_is_filled_in_and_the_rest_stays(tokenizer: Tokenizer) -> None:
    wanted = tokenizer.encode_batch(["the of and"])[0]
    first, last = tokenizer.decode(wanted[:1]), tokenizer.decode(wanted[2:])
    row = with_masks(tokenizer, f"{first}{MASK_TOKEN}{last}")
    model = always(*wanted, vocab=tokenizer.vocab_size)
    assert fill_rows(model, [row], SamplingOptions(1), tokenizer.mask_id) == [wanted]


def test_a_text_without_masks_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no <\|mdm_mask\|>"):
        with_masks(tokenizer, "the")


def test_a_continuation_ends_at_the_first_end_of_text(tokenizer: Tokenizer) -> None:
    prompt, word = tokenizer.encode_batch(["the"])[0], tokenizer.encode_batch([" of"])[0]
    answer = [*prompt, *word, tokenizer.eos_id, *word]
    model = always(*answer, vocab=tokenizer.vocab_size)
    length = len(answer) - len(prompt)
    seen: list[tuple[int, int]] = []
    mask, end = tokenizer.mask_id, [tokenizer.eos_id]
    found = continue_prompts(
        model, [prompt], length, SamplingOptions(), mask, end, on_progress=lambda *at: seen.append(at)
    )
    assert found == [word] and seen[-1] == (length, length)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
