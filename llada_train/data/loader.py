"""Rows and their noise → this rank's Batches, made ahead of the training thread. The only state is consumed_samples."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from llada_train.config.schema import Config
from llada_train.data.batch import Batch, Segments
from llada_train.data.rows import PretrainingData
from llada_train.data.timeline import Timeline
from llada_train.data.tokenizer import Tokenizer
from llada_train.objective.forward_process import Noise, training_noise, validation_noise

MASKED_MULTIPLE = 256  # few different K keep kernels and allocator blocks few
FILLER = -1  # sample_index of a row that only fills a batch up


@dataclass(frozen=True)
class Row:
    """One sequence and its noise."""

    sample_index: int
    tokens: np.ndarray  # [L] int64, clean; L ≤ S
    mask: np.ndarray  # [L] bool
    mask_probability: float
    loss_weight: float  # of each masked token


@dataclass(frozen=True)
class Place:
    """What one process reads of a global batch: a block of its rows, a slice of their columns, all equally large."""

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1


ALONE = Place()


def collate(rows: Sequence[Row], sequence_length: int, mask_id: int, padding_id: int, place: Place = ALONE) -> Batch:
    """B rows, padded at the end to `sequence_length` → a Batch of this place's S columns of them.

    A row's padding is a segment of its own: no token attends to it and no loss reads it.
    """
    B, S = len(rows), sequence_length // place.context_parallel_size
    first = place.context_parallel_rank * S
    clean = np.full((B, sequence_length), padding_id, np.int64)
    mask = np.zeros((B, sequence_length), bool)
    for b, row in enumerate(rows):
        clean[b, : len(row.tokens)] = row.tokens
        mask[b, : len(row.tokens)] = row.mask
    clean, mask = clean[:, first : first + S], mask[:, first : first + S]

    positions = np.flatnonzero(mask)
    weight = np.array([row.loss_weight for row in rows])[positions // S]
    fill = max(1, -(-len(positions) // MASKED_MULTIPLE)) * MASKED_MULTIPLE - len(positions)
    return Batch(
        input_ids=torch.from_numpy(np.where(mask, mask_id, clean)),
        position_ids=torch.arange(first, first + S).repeat(B, 1),
        segments=_segments(np.array([len(row.tokens) for row in rows]), sequence_length, range(first, first + S)),
        masked_positions=torch.from_numpy(np.pad(positions, (0, fill))),
        targets=torch.from_numpy(np.pad(clean.ravel()[positions], (0, fill))),
        loss_weight=torch.from_numpy(np.pad(weight, (0, fill)).astype(np.float32)),
        sample_index=torch.tensor([row.sample_index for row in rows]),
        t=torch.tensor([row.mask_probability for row in rows], dtype=torch.float32),
    )


def _segments(lengths: np.ndarray, sequence_length: int, columns: range) -> Segments | None:
    """Of rows of these lengths each row's tokens and, where it is cut, its padding; None: no row is cut."""
    if np.all(lengths == sequence_length):
        return None
    starts = np.arange(len(lengths)) * sequence_length
    borders = np.unique(np.concatenate([starts, starts + lengths, [len(lengths) * sequence_length]]))
    row, column = np.divmod(borders, sequence_length)
    own_borders = row * len(columns) + np.clip(column - columns.start, 0, len(columns))
    return Segments(
        cu_seqlens_q=torch.from_numpy(own_borders.astype(np.int32)),
        cu_seqlens_kv=torch.from_numpy(borders.astype(np.int32)),
        lengths=tuple(zip(np.diff(own_borders).tolist(), np.diff(borders).tolist(), strict=True)),
    )


@dataclass(frozen=True)
class GlobalBatch:
    """This process's micro-batches of the samples [first_sample, end_sample)."""

    first_sample: int
    end_sample: int
    batches: list[Batch]


class TrainingLoader:
    """This process's part of each global batch: a contiguous block of its rows, in micro-batches."""

    def __init__(self, data: PretrainingData, config: Config, place: Place = ALONE) -> None:
        self._data = data
        self._config = config
        self._place = place

    def at(self, timeline: Timeline) -> "TrainingLoader":
        """The same loader in the order of a run with this timeline."""
        return TrainingLoader(self._data.at(timeline), self._config, self._place)

    def samples(self, first_sample: int) -> range:
        """The places in the run's order of the rows that this process reads of the global batch at `first_sample`."""
        rows = self._data.timeline.phase(first_sample).global_batch_size // self._place.data_parallel_size
        first = first_sample + self._place.data_parallel_rank * rows
        return range(first, first + rows)

    def global_batch(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at `first_sample`.

        The lengths and weights of all N rows are drawn, since the weights are normalised over the global batch; the
        tokens and masks only of this rank's rows.
        """
        config, data = self._config, self._data
        phase, samples = data.timeline.phase(first_sample), self.samples(first_sample)
        size, length = phase.global_batch_size, phase.sequence_length
        noise = training_noise(config.seed, first_sample, size, length, config.objective)
        tokens = data.training_rows(samples)
        rows = [_row(t, noise, g - first_sample) for t, g in zip(tokens, samples, strict=True)]
        return _micro_batches(rows, length, data.tokenizer, config, self._place)

    def iterate(self, consumed_samples: int, until_samples: int) -> Generator[GlobalBatch, None, None]:
        """The global batches of the steps that follow consumed_samples, to before until_samples.

        A background thread keeps data.prefetch of them ready. What it raises is raised here, at the batch concerned.
        Closing the iterator stops the thread.
        """
        timeline = self._data.timeline
        starts = timeline.steps(consumed_samples, until_samples)
        # A new thread pins memory for device 0, whatever the process's device is.
        on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else (None, ())
        executor = ThreadPoolExecutor(1, "loader", *on_device)
        try:
            ready = deque(
                (s, executor.submit(self.global_batch, s)) for s in islice(starts, self._config.data.prefetch)
            )
            while ready:
                first_sample, made = ready.popleft()
                batches = made.result()
                ready.extend((s, executor.submit(self.global_batch, s)) for s in islice(starts, 1))
                yield GlobalBatch(first_sample, first_sample + timeline.phase(first_sample).global_batch_size, batches)
        finally:
            executor.shutdown(cancel_futures=True)


def validation_batches(data: PretrainingData, config: Config, place: Place = ALONE) -> list[Batch]:
    """This process's micro-batches of the validation rows, the same noise every time; empty where nothing is held out.

    Rows without masks (sample_index -1) fill up, so that every rank has the same number of batches of the same shape.
    Over all ranks, Σ weight · NLL estimates the bound in nats per token.
    """
    tokens = data.validation_rows
    multiple = config.training.micro_batch_size * config.parallel.micro_batch_multiple
    rows_per_rank = -(-len(tokens) // (place.data_parallel_size * multiple)) * multiple
    noise = validation_noise(config.seed, len(tokens), data.sequence_length, config.objective.epsilon)
    filler = np.full(data.sequence_length, data.tokenizer.eos_id)
    no_mask = np.zeros(data.sequence_length, bool)
    indices = range(place.data_parallel_rank * rows_per_rank, (place.data_parallel_rank + 1) * rows_per_rank)
    rows = [
        _row(tokens[i], noise, i)
        if i < len(tokens)
        else Row(FILLER, filler, no_mask, mask_probability=1, loss_weight=0)
        for i in indices
    ]
    return _micro_batches(rows, data.sequence_length, data.tokenizer, config, place)


def _row(tokens: np.ndarray, noise: Noise, i: int) -> Row:
    return Row(
        sample_index=noise.first_sample + i,
        tokens=tokens[: noise.lengths[i]],
        mask=noise.mask(i),
        mask_probability=float(noise.mask_probability[i]),
        loss_weight=float(noise.loss_weight[i]),
    )


def _micro_batches(
    rows: list[Row], sequence_length: int, tokenizer: Tokenizer, config: Config, place: Place
) -> list[Batch]:
    size = config.training.micro_batch_size
    batches = [
        collate(rows[i : i + size], sequence_length, tokenizer.mask_id, tokenizer.eos_id, place)
        for i in range(0, len(rows), size)
    ]
    return [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches
