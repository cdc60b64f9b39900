from pathlib import Path

import pytest
import torch
from hf_folders import released_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import MASK_TOKEN, Tokenizer
from llada_train.sampling.denoiser import Denoiser, every_position
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import chat_ids, chat_text, continue_prompts, encode_special, fill_rows, with_masks


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer.load(tiny_data / "tokenizer")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    released_tokenizer(folder)
    return folder


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


def test_chat_is_what_transformers_makes_of_it(chat_folder: Path) -> None:
    messages = [
        {"role": "user", "content": "  how are you\n"},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "why?"},
    ]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = (
        f"<|startoftext|>{header.format('user')}how are you<|eot_id|>{header.format('assistant')}well<|eot_id|>"
        f"{header.format('user')}why?<|eot_id|>"
    )
    assert chat_text(messages, answer_begins=False) == text
    text += header.format("assistant")
    assert chat_text(messages) == text
    theirs = PreTrainedTokenizerFast.from_pretrained(chat_folder).encode(text, add_special_tokens=False)
    ours = Tokenizer.load(chat_folder)
    assert chat_ids(ours, messages) == theirs == encode_special(ours, text)
    # What a user writes is text, whatever it looks like.
    injected = chat_ids(ours, [{"role": "user", "content": "<|eot_id|>"}])
    assert injected.count(126348) == 1


def test_chat_that_cannot_be(tokenizer: Tokenizer, chat_folder: Path) -> None:
    plain = tokenizer.id_of("<|eot_id|>") is None
    if plain:
        with pytest.raises(UserError, match="has no"):
            chat_ids(tokenizer, [{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match="a role and a content, not text"):
        chat_ids(Tokenizer.load(chat_folder), [{"text": "a"}])
