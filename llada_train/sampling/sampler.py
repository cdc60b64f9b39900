"""LLaDA's reverse process: predict masks, keep some of the predictions, go on (paper §2.4, Alg. 4 and 5).

What is committed is never masked again. Every draw is a function of (seed, the row's key, the row's own step), and each
row goes its own way, so that its result does not depend on the rows beside it. Rows are kept on the CPU; the denoiser
takes them where its model is. Shapes: B rows, L columns, N positions whose logits are wanted, V ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.sampling.denoiser import Denoiser, Query
from llada_train.sampling.noise import position_seeds
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.predict import Prediction
from llada_train.sampling.schedule import keyed_uniforms, random_steps, transfer_counts

OnStep = Callable[[list[tuple[int, int, int, float]]], None]
"""Gets what a forward pass settled: (row, column, id, the model's probability of it without temperature)."""


def generate(
    denoiser: Denoiser,
    prompt: Tensor,
    gen_length: int,
    options: SamplingOptions,
    mask_id: int,
    visible: Tensor | None = None,
    keys: Sequence[int] | None = None,
    on_step: OnStep = lambda settled: None,
) -> Tensor:
    """Continue each prompt by `gen_length` tokens.

    Args:
        prompt: [B, P] int64, without masks; P may be 0. Prompts of several lengths are padded on the left.
        visible: [B, P] bool, False where a prompt is padding.
        keys, on_step: as of `infill`.

    Returns:
        [B, P + gen_length]: prompt and continuation.

    Raises:
        UserError: gen_length is not a multiple of the block length, steps not of the number of blocks, or the prompt
            holds masks.
    """
    options.check_length(gen_length)
    if (prompt == mask_id).any():
        raise UserError(f"sampling: the prompt holds the mask id {mask_id}; fill it in with infill")
    ids = torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id)
    if visible is not None:
        visible = torch.nn.functional.pad(visible, (0, gen_length), value=True)
    return infill(denoiser, ids, options, mask_id, visible, keys, on_step)


@torch.no_grad()
def infill(
    denoiser: Denoiser,
    ids: Tensor,
    options: SamplingOptions,
    mask_id: int,
    visible: Tensor | None = None,
    keys: Sequence[int] | None = None,
    on_step: OnStep = lambda settled: None,
) -> Tensor:
    """Fill in the masks of `ids`, wherever they are; the other tokens stay.

    Blocks are counted in masks, from the left, in each row.

    Args:
        ids: [B, L] int64 on the CPU; rows may differ in their numbers of masks.
        visible: [B, L] bool, False where a column is padding, on whichever side.
        keys: of the rows' randomness, 0 … 2⁶⁴ − 1; their places if left out.
        on_step: gets what each forward pass settled.

    Returns:
        [B, L].

    Raises:
        UserError: steps is not a multiple of a row's number of blocks, or the model has no cache that is asked for.
    """
    if options.cache != "none":
        from llada_train.sampling.cache import CachedDenoiser
        from llada_train.sampling.plain import PlainDenoiser  # and with it transformers

        if not isinstance(denoiser, PlainDenoiser):
            raise UserError(f"sampling: this model keeps no keys and values; leave out the cache {options.cache!r}")
        denoiser = CachedDenoiser(denoiser, options.cache)
    ids = ids.clone()
    masked = ids == mask_id
    places = masked.cumsum(1) - 1  # what noise knows a mask by, wherever its row begins
    keys = range(len(ids)) if keys is None else keys
    steps = [options.steps_per_block(masks) for masks in masked.sum(1).tolist()]
    ways = [_steps(*row, options, mask_id) for row in zip(ids, steps, keys, strict=True)]
    done = 0
    while asked := [(row, step) for row, way in enumerate(ways) if (step := next(way, None)) is not None]:
        at = torch.tensor([row for row, _ in asked])
        block, wanted = torch.zeros(2, len(at), ids.shape[1], dtype=torch.bool)
        for i, (_, step) in enumerate(asked):
            block[i, step.block], wanted[i, step.wanted] = True, True
        query = Query(ids[at], wanted, None if visible is None else visible[at], at, block)
        if options.cfg:
            query = replace(query, unconditional=ids[at].masked_fill(~masked[at], mask_id), cfg=options.cfg)
        read = Prediction(options, mask_id)
        if options.temperature:
            seeds = [position_seeds(options.seed, keys[row], done, places[row, step.wanted]) for row, step in asked]
            read = replace(read, seeds=torch.cat(seeds))
        predicted, confidence = denoiser(query, read).unbind(1)
        sizes = [len(step.wanted) for _, step in asked]
        settled: list[tuple[int, int, int, float]] = []
        for (row, step), tokens, sure in zip(
            asked, predicted.long().split(sizes), confidence.split(sizes), strict=True
        ):
            kept = step.keep(sure)
            columns = step.wanted[kept]
            ids[row, columns] = tokens[kept]
            settled += zip(repeat(row), columns.tolist(), tokens[kept].tolist(), sure[kept].tolist())
        on_step(settled)
        done += 1
    return ids


@dataclass(frozen=True)
class _Step:
    """What a row wants predicted. What it keeps has to be in the row when the next step is asked for."""

    block: Tensor
    """Columns of the block in hand."""
    wanted: Tensor
    """[n] columns, some of the block's."""
    keep: Callable[[Tensor], Tensor]
    """Confidences [n] → which of the n predictions to keep."""


def _steps(ids: Tensor, steps: int, key: int, options: SamplingOptions, mask_id: int) -> Iterator[_Step]:
    """The way of one row [L], which is filled in meanwhile; `steps` of each block."""
    masks = (ids == mask_id).nonzero()[:, 0]
    if not len(masks):
        return
    uniforms = keyed_uniforms(options.seed, key, len(masks))
    length = options.block_length or len(masks)
    for number, (block, of_block) in enumerate(zip(masks.split(length), uniforms.split(length), strict=True)):
        if options.remasking == "random":
            when = random_steps(len(block), steps, options, of_block)
            for step in when.unique():
                yield _Step(block, block[when == step], _all)
        elif options.threshold is not None:
            while len(left := block[ids[block] == mask_id]):
                yield _Step(block, left, partial(_at_least, options.threshold))
        else:
            # The released code also takes up again what earlier blocks left as masks.
            scope = masks[: (number + 1) * length] if options.rules == "released" else block
            for transfers in transfer_counts(len(block), steps, options):
                if transfers:
                    yield _Step(block, scope[ids[scope] == mask_id], partial(_best, transfers))
        if torch.isin(ids[masks], torch.tensor(options.stop_ids)).any():
            ids[masks[ids[masks] == mask_id]] = options.stop_ids[0]
            return


def _all(confidence: Tensor) -> Tensor:
    return torch.arange(len(confidence))


def _at_least(threshold: float, confidence: Tensor) -> Tensor:
    enough = confidence >= threshold
    enough[confidence.argmax()] = True
    return enough.nonzero()[:, 0]


def _best(transfers: int, confidence: Tensor) -> Tensor:
    return confidence.argsort(descending=True, stable=True)[:transfers]
