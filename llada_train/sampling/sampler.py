"""LLaDA's reverse process: predict every mask, keep the best predictions, go on (paper §2.4, Alg. 4 and 5).

The details are the released generate.py's: a fixed number of tokens at each step, and none is masked again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llada_train.config.errors import UserError

LogitsFn = Callable[[Tensor], Tensor]
"""Token ids [B, L] → logits [B, L, V]. It alone decides which ids can come out: 0..V−1."""

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to fill in masks.

    Raises:
        UserError: a value out of range.
    """

    steps: int
    """Forward passes, over all blocks."""
    block_length: int | None = None
    """Masks that are filled in before the next ones to the right (semi-autoregressive); None: all at once."""
    temperature: float = 0.0
    """0: the most probable token; 1: a draw from the model's distribution."""
    remasking: Remasking = "low_confidence"
    """Which predictions to keep: the most probable ones (Alg. 5), or random ones (Alg. 4)."""
    seed: int = 0
    allow_mask_id: bool = False
    """Let the model predict the mask id itself, which then stays in the output, as the released code does."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampling: steps is {self.steps}; give at least 1")
        if self.block_length is not None and self.block_length < 1:
            raise UserError(f"sampling: block length is {self.block_length}; give at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"sampling: temperature is {self.temperature}; give 0 or more")
        if self.remasking not in get_args(Remasking):
            raise UserError(f"sampling: remasking is {self.remasking!r}; give one of {', '.join(get_args(Remasking))}")


def generate(logits_fn: LogitsFn, prompt: Tensor, gen_length: int, options: SamplingOptions, mask_id: int) -> Tensor:
    """Continue each prompt by `gen_length` tokens.

    Args:
        prompt: [B, P] int64, without masks; P may be 0.

    Returns:
        [B, P + gen_length]: prompt and continuation.

    Raises:
        UserError: gen_length is not a multiple of the block length, steps not of the number of blocks, or the prompt
            holds masks.
    """
    if gen_length < 1:
        raise UserError(f"sampling: the length is {gen_length}; give at least 1")
    if options.block_length is not None and gen_length % options.block_length:
        raise UserError(f"sampling: length {gen_length} is not a multiple of block length {options.block_length}")
    if (prompt == mask_id).any():
        raise UserError(f"sampling: the prompt holds the mask id {mask_id}; fill it in with infill")
    return infill(logits_fn, torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id), options, mask_id)


@torch.no_grad()
def infill(logits_fn: LogitsFn, ids: Tensor, options: SamplingOptions, mask_id: int) -> Tensor:
    """Fill in the masks of `ids`, wherever they are; the other tokens stay.

    Blocks are counted in masks, from the left, in each row. Within a block of n masks and s steps, each step commits
    n // s predictions, and the first n % s steps one more.

    Args:
        ids: [B, L] int64; rows may differ in their numbers of masks.

    Returns:
        [B, L].

    Raises:
        UserError: steps is not a multiple of the number of blocks.
    """
    ids = ids.clone()
    masked = ids == mask_id
    most = int(masked.sum(1).max()) if masked.any() else 0
    if not most:
        return ids
    block_length = options.block_length or most
    blocks = -(-most // block_length)
    if options.steps % blocks:
        fitting = -(-options.steps // blocks) * blocks
        raise UserError(
            f"sampling: {options.steps} steps are not a multiple of the {blocks} blocks "
            f"({most} masks, block length {block_length}); the next larger number is {fitting}"
        )
    steps_per_block = options.steps // blocks
    generator = torch.Generator(ids.device).manual_seed(options.seed)
    block_of = torch.where(masked, (masked.cumsum(1) - 1) // block_length, -1)
    for block in range(blocks):
        counts = transfer_counts((block_of == block).sum(1), steps_per_block)
        for step in range(steps_per_block):
            candidates = (block_of == block) & (ids == mask_id)
            if counts[:, step].any():
                _commit(ids, candidates, counts[:, step], logits_fn(ids), options, mask_id, generator)
    return ids


def transfer_counts(masks: Tensor, steps: int) -> Tensor:
    """Tokens to commit at each step: n // steps, the remainder one each to the first steps. [B] → [B, steps]."""
    extra = torch.arange(steps, device=masks.device) < (masks % steps)[:, None]
    return (masks // steps)[:, None] + extra


def _commit(
    ids: Tensor,
    candidates: Tensor,
    counts: Tensor,
    logits: Tensor,
    options: SamplingOptions,
    mask_id: int,
    generator: torch.Generator,
) -> None:
    """Write the best `counts` [B] predictions for the positions `candidates` [B, L] into `ids` [B, L]."""
    scores = logits[candidates].double()  # [N, V]
    if not options.allow_mask_id and mask_id < scores.shape[-1]:
        scores[:, mask_id] = -torch.inf
    predicted = _draw(scores, options.temperature, generator)
    if options.remasking == "random":
        chosen = torch.rand(len(scores), generator=generator, dtype=torch.float64, device=ids.device)
    else:
        chosen = scores.softmax(-1).gather(1, predicted[:, None])[:, 0]
    confidence = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=ids.device)
    confidence[candidates] = chosen
    proposal = ids.clone()
    proposal[candidates] = predicted
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    committed = candidates & (rank < counts[:, None])
    ids[committed] = proposal[committed]


def _draw(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token from softmax(scores / temperature) in each row, by the Gumbel-max trick in fp64. [N, V] → [N].

    argmax of exp(score) / (−ln U)^T, in logarithms; lower precision distorts the draw (arXiv 2409.02908).
    """
    if temperature == 0:
        return scores.argmax(-1)
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64, device=scores.device)
    return (scores - temperature * (-uniform.log()).log()).argmax(-1)
