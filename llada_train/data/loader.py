"""Rows and their noise → this rank's Batches, made ahead of the training thread. The only state is consumed_samples."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np
import torch

from llada_train.config.schema import Config
from llada_train.data.batch import Batch, Segments
from llada_train.data.place import ALONE, MASKED_MULTIPLE, Place
from llada_train.data.timeline import Timeline
from llada_train.data.training_data import Row, Sample, TrainingData

SHAPES = 32  # different lengths of an SFT run's micro-batches
FILLER = -1  # sample_index of a row that only fills a batch up


def collate(rows: Sequence[Row], sequence_length: int, mask_id: int, padding_id: int, place: Place = ALONE) -> Batch:
    """B rows, padded at the end to `sequence_length` → a Batch of this place's S columns of them.

    Positions begin again with each sample and each document. A row's padding is a segment of its own: no token attends
    to it and no loss reads it.
    """
    B, S = len(rows), sequence_length // place.context_parallel_size
    first = place.context_parallel_rank * S
    clean = np.full((B, sequence_length), padding_id, np.int64)
    mask = np.zeros((B, sequence_length), bool)
    owner = np.zeros((B, sequence_length), np.int64)  # number of a token's sample
    samples = list(chain.from_iterable(rows))
    numbers = count()
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            stop = start + len(sample.tokens)
            clean[b, start:stop], mask[b, start:stop], owner[b, start:stop] = sample.tokens, sample.mask, next(numbers)
            start = stop
    clean, mask, owner = (whole[:, first : first + S] for whole in (clean, mask, owner))
    lengths = [_segment_lengths(row, sequence_length) for row in rows]
    positions_in_row = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])

    positions = np.flatnonzero(mask)
    masked_samples = owner.ravel()[positions]
    weight = np.array([sample.loss_weight for sample in samples])[masked_samples]
    fill = max(1, -(-len(positions) // MASKED_MULTIPLE)) * MASKED_MULTIPLE - len(positions)
    return Batch(
        input_ids=torch.from_numpy(np.where(mask, mask_id, clean)),
        position_ids=torch.from_numpy(positions_in_row[:, first : first + S].copy()),
        segments=_segments(lengths, sequence_length, range(first, first + S)),
        masked_positions=torch.from_numpy(np.pad(positions, (0, fill))),
        targets=torch.from_numpy(np.pad(clean.ravel()[positions], (0, fill))),
        loss_weight=torch.from_numpy(np.pad(weight, (0, fill)).astype(np.float32)),
        masked_samples=torch.from_numpy(np.pad(masked_samples, (0, fill))),
        sample_index=torch.tensor([sample.sample_index for sample in samples]),
        t=torch.tensor([sample.mask_probability for sample in samples], dtype=torch.float32),
    )


def _segment_lengths(row: Row, sequence_length: int) -> tuple[int, ...]:
    """Of the documents of the row's samples and, where they do not fill it, of its padding."""
    documents = tuple(chain.from_iterable(sample.document_lengths for sample in row))
    padding = sequence_length - sum(documents)
    return (*documents, padding) if padding else documents


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

    def __init__(self, data: TrainingData, config: Config, place: Place = ALONE) -> None:
        self._data = data
        self._config = config
        self._place = place

    def at(self, timeline: Timeline) -> "TrainingLoader":
        """The same loader in the order of a run with this timeline."""
        return TrainingLoader(self._data.at(timeline), self._config, self._place)

    def global_batch(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at `first_sample`.

        The lengths and weights of all N samples are drawn, since the weights are normalised over the global batch; the
        tokens and masks only of this rank's.
        """
        length = self._data.timeline.phase(first_sample).sequence_length
        packing = self._data.packing(first_sample)
        own, fillers = place_rows(len(packing), self._data, self._config, self._place)
        samples = iter(self._data.samples(first_sample, list(chain(*packing[own.start : own.stop]))))
        rows = [tuple(islice(samples, len(packing[row]))) for row in own]
        return micro_batches([*rows, *fillers], length, self._data, self._config, self._place)

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


def validation(data: TrainingData, config: Config, place: Place = ALONE) -> Validation:
    """The validation rows and this process's micro-batches of them.

    Rows without masks (sample_index -1) fill up, so that every rank has the same number of batches of the same shape.
    Over all ranks, Σ weight · NLL estimates the bound in nats per token.
    """
    own, fillers = place_rows(sum(data.validation_counts), data, config, place)
    rows = [*((sample,) for sample in data.validation_samples(own)), *fillers]
    return Validation(
        batches=micro_batches(rows, data.sequence_length, data, config, place),
        t=data.validation_t,
        counts={name: n for name, n in zip(data.names, data.validation_counts, strict=True) if n},
    )


def place_rows(total: int, data: TrainingData, config: Config, place: Place) -> tuple[range, list[Row]]:
    """Which of so many rows a place has, and rows without masks that fill its micro-batches up."""
    own, missing = place.rows(total, config)
    length = 1 if config.sft else data.sequence_length  # a row of pre-training always has all columns
    filler = Sample(FILLER, np.full(length, data.tokenizer.eos_id), np.zeros(length, bool), 1.0, 0.0, (length,))
    return own, [(filler,)] * missing


def micro_batches(
    rows: list[Row], sequence_length: int, data: TrainingData, config: Config, place: Place
) -> list[Batch]:
    """A place's rows in micro-batches; of an SFT run those of each are as long as the longest of them needs."""
    size = config.training.micro_batch_size
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    longest = [sequence_length] * len(groups)
    if config.sft is not None:
        longest = [max(sum(len(sample.tokens) for sample in row) for row in group) for group in groups]
        if config.parallel.pipeline_parallel > 1:  # its stages send each other tensors of one shape in all of a step
            longest = [max(longest)] * len(groups)
    ids = data.tokenizer.mask_id, data.tokenizer.eos_id
    batches = [
        collate(group, columns(tokens, sequence_length, config.parallel.row_multiple), *ids, place)
        for group, tokens in zip(groups, longest, strict=True)
    ]
    return [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches


def columns(tokens: int, sequence_length: int, multiple: int) -> int:
    """S of rows of at most `tokens` ≤ sequence_length: one of at most SHAPES, so that kernels and memory are reused."""
    step = -(-sequence_length // SHAPES // multiple) * multiple
    return min(-(-tokens // step) * step, sequence_length)
