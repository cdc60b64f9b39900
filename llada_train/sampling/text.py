"""Batches of prompts, and of texts with mask tokens anywhere; each row's result is that of the row alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import MASK_TOKEN, Tokenizer
from llada_train.sampling.denoiser import Denoiser
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.sampler import OnStep, infill

OnProgress = Callable[[int, int], None]
"""Gets (tokens done, tokens in all)."""


def fill_rows(
    denoiser: Denoiser,
    rows: Sequence[Sequence[int]],
    options: SamplingOptions,
    mask_id: int,
    batch_size: int = 8,
    keys: Sequence[int] | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_step: OnStep = lambda settled: None,
) -> list[list[int]]:
    """Fill in the masks of rows of any lengths, `batch_size` at a time, those of like lengths together.

    Args:
        rows: token ids with masks anywhere.
        keys: of the rows' randomness; their places if left out.
        on_step: as of `infill`; it counts rows within a batch.

    Raises:
        UserError: as `infill`.
    """
    masks = [list(row).count(mask_id) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    filled: dict[int, list[int]] = {}
    done = 0
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        length = max(len(rows[i]) for i in batch)
        ids = torch.tensor([[*rows[i], *[-1] * (length - len(rows[i]))] for i in batch])
        visible = ids >= 0

        def count(settled: list[tuple[int, int, int, float]]) -> None:
            nonlocal done
            done += len(settled)
            on_progress(done, sum(masks))
            on_step(settled)

        out = infill(
            denoiser,
            ids.clamp(min=0),
            options,
            mask_id,
            None if visible.all() else visible,
            [i if keys is None else keys[i] for i in batch],
            count,
        )
        filled |= {i: row[: len(rows[i])].tolist() for i, row in zip(batch, out, strict=True)}
        done = sum(masks[i] for i in filled)
        on_progress(done, sum(masks))
    return [filled[i] for i in range(len(rows))]


def continue_prompts(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    options: SamplingOptions,
    mask_id: int,
    end_ids: Sequence[int],
    batch_size: int = 8,
    keys: Sequence[int] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> list[list[int]]:
    """The answers to prompts, of at most `gen_length` tokens; the first of `end_ids` and what follows are cut (§2.4).

    Arguments and errors as of `fill_rows`; the prompts hold no masks.
    """
    options = replace(options, stop_ids=tuple(end_ids))
    options.check_length(gen_length)
    rows = [[*prompt, *[mask_id] * gen_length] for prompt in prompts]
    filled = fill_rows(denoiser, rows, options, mask_id, batch_size, keys, on_progress)
    answers = [row[len(prompt) :] for row, prompt in zip(filled, prompts, strict=True)]
    return [[*takewhile(lambda id: id not in end_ids, answer)] for answer in answers]


def with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text`, with a mask for each mask token in it.

    Raises:
        UserError: there is none.
    """
    pieces = tokenizer.encode_batch(text.split(MASK_TOKEN))
    if len(pieces) == 1:
        raise UserError(f"--infill: no {MASK_TOKEN} in the text; write one for each token to fill in")
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, tokenizer.mask_id, *piece]
    return ids
