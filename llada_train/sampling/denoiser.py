"""What sampling and likelihoods ask of a model: the logits of chosen positions of noised rows.

Logits are read where they are made, a piece of positions at a time: at a vocabulary of 126,464 those of a thousand
positions would be gigabytes, and of a model that is split over processes they would have to travel.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

PIECE = 1 << 25
"""Logits that are held at once."""


@dataclass(frozen=True)
class Query:
    """B rows of L columns, all on one device; a denoiser takes them to that of its model."""

    ids: Tensor
    """[B, L] int64, with the mask id where a token is unknown."""
    wanted: Tensor
    """[B, L] bool: the N positions, all of them masks, whose logits are asked for."""
    visible: Tensor | None = None
    """[B, L] bool, False where a column is padding, on whichever side; None: there is none."""
    rows: Tensor | None = None
    """[B] int64, which rows of a batch these are; what a cache knows them by."""
    block: Tensor | None = None
    """[B, L] bool: what is being filled in now; what a cache may recompute alone."""
    unconditional: Tensor | None = None
    """[B, L] the ids with all that was given masked as well; None: without guidance."""
    cfg: float = 0.0
    """Weight w of classifier-free guidance: logits u + (w + 1)(c − u), u those of the unconditional rows."""

    def to(self, device: torch.device) -> "Query":
        return self._map(lambda part: part.to(device))

    def part(self, rows: slice) -> "Query":
        """Some of the rows."""
        return self._map(lambda part: part[rows])

    def doubled(self) -> "Query":
        """The conditional rows and then the unconditional ones, which a cache tells apart; without guidance itself."""
        if self.unconditional is None:
            return self
        both = replace(self, unconditional=None)._map(lambda part: torch.cat([part, part]))
        rows = both.rows if self.rows is None else torch.cat([self.rows, ~self.rows])
        return replace(both, ids=torch.cat([self.ids, self.unconditional]), rows=rows)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Query":
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(part) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **mapped)


class Read(ABC):
    """What is to be known of logits: some numbers for each position. It may travel to other processes."""

    width: ClassVar[int]
    """How many numbers."""

    @abstractmethod
    def __call__(self, logits: Tensor, index: Tensor) -> Tensor:
        """[n, width] from the logits [n, V], which may be overwritten, of the wanted positions `index` [n], 0 … N − 1.

        `index` is on the host.
        """


class Denoiser(Protocol):
    """A mask predictor."""

    def __call__(self, query: Query, read: Read) -> Tensor:
        """What `read` makes of the wanted positions' logits, row by row: fp64 [N, width], on the host."""
        ...


def every_position(logits_fn: Callable[[Tensor], Tensor]) -> Denoiser:
    """A denoiser of what computes the logits [B, L, V] of all positions of the ids [B, L], without padding."""

    def denoiser(query: Query, read: Read) -> Tensor:
        query = query.doubled()
        logits = logits_fn(query.ids)[query.wanted]
        return read_logits(logits, lambda piece: piece, logits.shape[-1], read, query.cfg)

    return denoiser


def read_logits(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    read: Read,
    cfg: float = 0.0,
    index: Tensor | None = None,
) -> Tensor:
    """What `read` makes of logits, a piece of positions at a time: fp64 [N, width], on the host.

    Args:
        head: hidden states [n, d] → logits [n, V].
        hidden: [N, d]; with guidance [2N, d], the conditional ones first.
        index: [N] int64, which of the query's wanted positions these are; all of them if left out.
    """
    halves = hidden.chunk(2) if cfg else (hidden,)
    index = torch.arange(len(halves[0])) if index is None else index
    size = max(1, PIECE // vocab_size // len(halves))
    found = []
    for number, *pieces in zip(index.split(size), *(half.split(size) for half in halves), strict=True):
        logits, *unconditional = map(head, pieces)
        if unconditional:
            logits = unconditional[0] + (cfg + 1) * (logits - unconditional[0])
        found.append(read(logits, number).double().cpu())
    return torch.cat(found)
