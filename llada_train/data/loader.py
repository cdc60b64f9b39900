"""Rows and their noise → this rank's Batches, made ahead of the training thread. The only state is consumed_samples."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch

from llada_train.config.schema import Config
from llada_train.data.batch import Batch, Segments
from llada_train.data.place import ALONE, MASKED_MULTIPLE, Place
from llada_train.data.rows import PretrainingData
from llada_train.data.timeline import Timeline
from llada_train.data.tokenizer import Tokenizer
from llada_train.objective.forward_process import Noise, training_noise, validation_noise

FILLER = -1  # sample_index of a row that only fills a batch up


@dataclass(frozen=True)
class Row:
    """One sequence and its noise."""

    sample_index: int
    tokens: np.ndarray  # [L] int64, clean; L ≤ S
    mask: np.ndarray  # [L] bool
    mask_probability: float
    loss_weight: float  # of each masked token
    document_lengths: tuple[int, ...]  # Σ = L: tokens see those of their own document; one, if they see the whole row


def collate(rows: Sequence[Row], sequence_length: int, mask_id: int, padding_id: int, place: Place = ALONE) -> Batch:
    """B rows, padded at the end to `sequence_length` → a Batch of this place's S columns of them.

    Positions begin again with each document. A row's padding is a segment of its own: no token attends to it and no
    loss reads it.
    """
    B, S = len(rows), sequence_length // place.context_parallel_size
    first = place.context_parallel_rank * S
    clean = np.full((B, sequence_length), padding_id, np.int64)
    mask = np.zeros((B, sequence_length), bool)
    for b, row in enumerate(rows):
        clean[b, : len(row.tokens)] = row.tokens
        mask[b, : len(row.tokens)] = row.mask
    clean, mask = clean[:, first : first + S], mask[:, first : first + S]
    lengths = [_segment_lengths(row, sequence_length) for row in rows]
    positions_in_row = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])

    positions = np.flatnonzero(mask)
    weight = np.array([row.loss_weight for row in rows])[positions // S]
    fill = max(1, -(-len(positions) // MASKED_MULTIPLE)) * MASKED_MULTIPLE - len(positions)
    return Batch(
        input_ids=torch.from_numpy(np.where(mask, mask_id, clean)),
        position_ids=torch.from_numpy(positions_in_row[:, first : first + S].copy()),
        segments=_segments(lengths, sequence_length, range(first, first + S)),
        masked_positions=torch.from_numpy(np.pad(positions, (0, fill))),
        targets=torch.from_numpy(np.pad(clean.ravel()[positions], (0, fill))),
        loss_weight=torch.from_numpy(np.pad(weight, (0, fill)).astype(np.float32)),
        sample_index=torch.tensor([row.sample_index for row in rows]),
        t=torch.tensor([row.mask_probability for row in rows], dtype=torch.float32),
    )


def _segment_lengths(row: Row, sequence_length: int) -> tuple[int, ...]:
    """Of the row's documents and, where it is cut, of its padding."""
    padding = sequence_length - len(row.tokens)
    return (*row.document_lengths, padding) if padding else row.document_lengths


def _segments(lengths: list[tuple[int, ...]], sequence_length: int, columns: range) -> Segments | None:
    """Of rows with segments of these lengths; None: every row is one."""
    if all(len(row) == 1 for row in lengths):
        return None
    borders = np.cumsum([0, *chain.from_iterable(lengths)])
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
        return self._place.samples(first_sample, self._data.timeline.phase(first_sample).global_batch_size)

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
        rows = [_row(t, noise, g - first_sample, data) for t, g in zip(tokens, samples, strict=True)]
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


@dataclass(frozen=True)
class Validation:
    """The held-out rows of a run, the same with the same noise every time, and this process's part of them."""

    batches: list[Batch]  # empty where nothing is held out
    t: np.ndarray  # [M] mask probability of each row
    counts: dict[str, int]  # rows of each corpus that holds documents out, those of one after another

    def by_corpus(self, bounds: np.ndarray) -> dict[str, float]:
        """The mean bound of each corpus, of the rows' [M]."""
        parts = np.split(bounds, np.cumsum(list(self.counts.values()))[:-1])
        return {name: float(part.mean()) for name, part in zip(self.counts, parts, strict=True)}

    def by_t(self, bounds: np.ndarray, buckets: int) -> list[float | None]:
        """The mean bound of the rows in each of so many equal ranges of t, of the rows' [M]; None: there is no row."""
        bucket = np.minimum((self.t * buckets).astype(int), buckets - 1)
        return [float(bounds[bucket == b].mean()) if (bucket == b).any() else None for b in range(buckets)]


def validation(data: PretrainingData, config: Config, place: Place = ALONE) -> Validation:
    """The validation rows and this process's micro-batches of them.

    Rows without masks (sample_index -1) fill up, so that every rank has the same number of batches of the same shape.
    Over all ranks, Σ weight · NLL estimates the bound in nats per token.
    """
    total = sum(data.validation_counts)
    multiple = config.training.micro_batch_size * config.parallel.micro_batch_multiple
    rows_per_rank = -(-total // (place.data_parallel_size * multiple)) * multiple
    noise = validation_noise(config.seed, data.validation_counts, data.sequence_length, config.objective.epsilon)
    length = data.sequence_length
    filler = Row(FILLER, np.full(length, data.tokenizer.eos_id), np.zeros(length, bool), 1.0, 0.0, (length,))
    first = place.data_parallel_rank * rows_per_rank
    own = range(min(first, total), min(first + rows_per_rank, total))
    rows = [_row(tokens, noise, i, data) for i, tokens in zip(own, data.read_validation_rows(own), strict=True)]
    rows += [filler] * (rows_per_rank - len(own))
    return Validation(
        batches=_micro_batches(rows, length, data.tokenizer, config, place),
        t=noise.mask_probability,
        counts={name: n for name, n in zip(data.names, data.validation_counts, strict=True) if n},
    )


def _row(tokens: np.ndarray, noise: Noise, i: int, data: PretrainingData) -> Row:
    tokens = tokens[: noise.lengths[i]]
    return Row(
        sample_index=noise.first_sample + i,
        tokens=tokens,
        mask=noise.mask(i),
        mask_probability=float(noise.mask_probability[i]),
        loss_weight=float(noise.loss_weight[i]),
        document_lengths=data.document_lengths(tokens),
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
