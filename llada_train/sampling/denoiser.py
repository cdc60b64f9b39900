"""What sampling and likelihoods ask of a model: the logits of chosen positions of noised rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_train.model.hf.modeling_llada import LLaDAModelLM, LLaDATransformer, rotary_angles


@dataclass(frozen=True)
class Query:
    """B rows of L columns, all on one device; a denoiser takes them to that of its model."""

    ids: Tensor
    """[B, L] int64, with the mask id where a token is unknown."""
    wanted: Tensor
    """[B, L] bool: the N positions whose logits are asked for."""
    visible: Tensor | None = None
    """[B, L] bool, False where a column is padding; None: there is none."""
    rows: Tensor | None = None
    """[B] int64, which rows of a batch these are; what a cache knows them by."""
    block: Tensor | None = None
    """[B, L] bool: what is being filled in now; what a cache may recompute alone."""

    def to(self, device: torch.device) -> "Query":
        visible, rows, block = (
            part if part is None else part.to(device) for part in (self.visible, self.rows, self.block)
        )
        return Query(self.ids.to(device), self.wanted.to(device), visible, rows, block)


class Denoiser(Protocol):
    """A mask predictor."""

    def __call__(self, query: Query) -> Tensor:
        """Logits [N, V] of the wanted positions, row by row; the caller may change them. Ids from V on never come."""
        ...


def every_position(logits_fn: Callable[[Tensor], Tensor]) -> Denoiser:
    """A denoiser of what computes the logits [B, L, V] of all positions of the ids [B, L], without padding."""
    return lambda query: logits_fn(query.ids)[query.wanted]


def guided(denoiser: Denoiser, query: Query, given: Tensor, mask_id: int, cfg: float, batch: int) -> Tensor:
    """Logits under classifier-free guidance: u + (w + 1)(c − u), u those with the `given` [B, L] masked as well.

    `batch`: the number of rows that a cache may meet; those of u come after them. Logits [N, V].
    """
    if not cfg:
        return denoiser(query)
    rows = torch.arange(len(query.ids), device=query.ids.device) if query.rows is None else query.rows
    twice = [None if part is None else torch.cat([part, part]) for part in (query.visible, query.block)]
    both = replace(
        query,
        ids=torch.cat([query.ids, query.ids.masked_fill(given, mask_id)]),
        wanted=torch.cat([query.wanted, query.wanted]),
        visible=twice[0],
        rows=torch.cat([rows, rows + batch]),
        block=twice[1],
    )
    conditional, unconditional = denoiser(both).chunk(2)
    return unconditional + (cfg + 1) * (conditional - unconditional)


class PlainDenoiser:
    """The plain torch model. The head is computed where it is wanted only."""

    def __init__(self, model: LLaDAModelLM, vocab_size: int) -> None:
        """`vocab_size`: the ids that the tokenizer knows; rows that only pad the vocabulary never come out."""
        self.transformer: LLaDATransformer = model.model.transformer
        self._vocab_size = vocab_size

    @torch.no_grad()
    def __call__(self, query: Query) -> Tensor:
        transformer = self.transformer
        query = query.to(transformer.wte.weight.device)
        h = transformer.wte(query.ids)
        angles = rotary_angles(transformer.config, h.shape[1], h.device)
        visible = None if query.visible is None else query.visible[:, None, None, :]
        for block in transformer.blocks:
            h = block(h, angles, visible)
        return self.head(h[query.wanted])

    def head(self, h: Tensor) -> Tensor:
        """Hidden states [N, d_model] after the last block → logits [N, V]."""
        return F.linear(self.transformer.ln_f(h), self.transformer.ff_out.weight[: self._vocab_size])
