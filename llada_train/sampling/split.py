"""Asking a model that several processes hold together, or hold copies of: rank 0 asks, all answer."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.data.batch import Batch
from llada_train.data.loader import FILLER, collate
from llada_train.data.training_data import Row, Sample
from llada_train.parallel.split_model import SplitModel
from llada_train.parallel.topology import broadcast
from llada_train.sampling.denoiser import Query, Read, read_logits

T = TypeVar("T")


class SplitDenoiser:
    """To be called on rank 0, within `lead`. Each copy of the model takes its share of a query's rows."""

    def __init__(self, model: SplitModel, mask_id: int, vocab_size: int) -> None:
        """`vocab_size`: the ids that the tokenizer knows; rows that only pad the vocabulary never come out."""
        self._model, self._mask_id, self._vocab_size = model, mask_id, vocab_size

    def over(self, vocab_size: int) -> "SplitDenoiser":
        """The same model, of so many ids."""
        return SplitDenoiser(self._model, self._mask_id, vocab_size)

    @property
    def copies(self) -> int:
        """Of the model: how many rows it takes to give each something to do."""
        return self._model.topology.place.data_parallel_size

    def lead(self, work: Callable[[], T]) -> T | None:
        """What `work` gives on rank 0, where it may call this and other denoisers of the model; None on the others.

        Collective: the other ranks answer meanwhile.

        Raises:
            UserError: `work` raised it; on all ranks.
        """
        topology, done = self._model.topology, None
        with topology.failing_together():
            if topology.is_main:
                # Any other exception may have left the others in the middle of an answer: they end with this process.
                try:
                    done = work()
                except UserError:
                    broadcast(None)
                    raise
                broadcast(None)
            else:
                while (asked := broadcast(None)) is not None:
                    self._answer(*asked)
        return done

    def __call__(self, query: Query, read: Read) -> Tensor:
        return self._answer(*broadcast((query, read, self._vocab_size)))

    def _answer(self, query: Query, read: Read, vocab_size: int) -> Tensor:
        place, stages = self._model.topology.place, self._model.parallel.pipeline_parallel
        # A micro-batch for each stage, so that none waits for longer than it has to.
        size = -(-len(query.ids) // (place.data_parallel_size * stages))
        first = place.data_parallel_rank * stages * size
        numbers = query.wanted.flatten().cumsum(0).view_as(query.ids) - 1
        micro_batches = [slice(start, start + size) for start in range(first, first + stages * size, size)]
        width = self._columns(query)
        asked = [self._batch(query.part(rows), numbers[rows], size, width) for rows in micro_batches]
        hidden = self._model.hidden([batch for batch, _ in asked])
        told = torch.zeros(int(query.wanted.sum()), read.width, dtype=torch.float64)
        with self._model.whole_head():
            for (_, index), rows in zip(asked, hidden, strict=False):  # stages before the last have none
                found = read_logits(
                    rows, lambda piece: self._model.logits(piece)[:, :vocab_size], vocab_size, read, query.cfg, index
                )
                if self._model.is_first_slice:
                    told[index] = found
        told = told.to(self._model.topology.device)
        dist.all_reduce(told)
        return told.cpu()

    def _columns(self, query: Query) -> int:
        """Of all micro-batches, whose stages send each other tensors of one shape."""
        longest = query.ids.shape[1] if query.visible is None else int(query.visible.sum(1).max())
        multiple = self._model.parallel.row_multiple
        return -(-longest // multiple) * multiple

    def _batch(self, query: Query, numbers: Tensor, size: int, columns: int) -> tuple[Batch, Tensor]:
        """`size` rows, with guidance twice as many, without their padding; and which of all wanted positions it asks
        this rank's columns for.
        """
        place = self._model.topology.place
        local = torch.full((len(query.ids), columns), -1)
        rows: list[Row] = []
        doubled = query.doubled()
        for i, (ids, wanted) in enumerate(zip(doubled.ids, doubled.wanted, strict=True)):
            seen = slice(None) if doubled.visible is None else doubled.visible[i]
            tokens = ids[seen].numpy()
            rows.append((Sample(i, tokens, wanted[seen].numpy(), 0.0, 1.0, (len(tokens),)),))
            if i < len(query.ids):
                local[i, : len(tokens)] = numbers[i].where(wanted, -1)[seen]
        filler = Sample(FILLER, np.zeros(columns, np.int64), np.zeros(columns, bool), 0.0, 0.0, (columns,))
        rows += [(filler,)] * (size * (2 if query.cfg else 1) - len(rows))
        batch = collate(rows, columns, self._mask_id, 0, place)
        local = local.chunk(place.context_parallel_size, 1)[place.context_parallel_rank]
        index = local[local >= 0]
        asked = batch.masked_positions[: len(index) * (2 if query.cfg else 1)]  # without what pads them
        return replace(batch, targets=None, masked_positions=asked), index
