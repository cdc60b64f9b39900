"""Text in, text out: prompts, and texts with mask tokens anywhere."""

import torch
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import MASK_TOKEN, Tokenizer
from llada_train.sampling.sampler import LogitsFn, SamplingOptions, generate, infill


def continue_text(
    logits_fn: LogitsFn, tokenizer: Tokenizer, prompt: str, gen_length: int, options: SamplingOptions
) -> str:
    """The prompt and its continuation by `gen_length` tokens; text after the first end-of-text is cut (paper §2.4)."""
    start = _ids(tokenizer.encode_batch([prompt])[0])
    ids = generate(logits_fn, start, gen_length, options, tokenizer.mask_id)[0, start.shape[1] :].tolist()
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return prompt + tokenizer.decode(ids)


def complete_text(logits_fn: LogitsFn, tokenizer: Tokenizer, text: str, options: SamplingOptions) -> str:
    """`text` with each mask token in it filled in.

    Raises:
        UserError: there is none.
    """
    pieces = tokenizer.encode_batch(text.split(MASK_TOKEN))
    if len(pieces) == 1:
        raise UserError(f"--infill: no {MASK_TOKEN} in the text; write one for each token to fill in")
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, tokenizer.mask_id, *piece]
    return tokenizer.decode(infill(logits_fn, _ids(ids), options, tokenizer.mask_id)[0].tolist())


def _ids(ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.int64)
