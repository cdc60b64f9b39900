"""What a run trains on, whatever its kind: corpora in the run's order, and the rows of its global batches.

A kind of run is a kind of TrainingData: which rows a batch has, what of them is masked and what each mask weighs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Self

import numpy as np

from llada_train.config.errors import UserError, under_key
from llada_train.config.schema import Config
from llada_train.data.corpus import Corpus, CorpusIdentity
from llada_train.data.order import Order
from llada_train.data.timeline import Phase, Timeline
from llada_train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One sequence and its noise."""

    sample_index: int
    tokens: np.ndarray  # [L] int64, clean; L ≤ S
    mask: np.ndarray  # [L] bool
    mask_probability: float
    loss_weight: float  # of each masked token
    document_lengths: tuple[int, ...]  # Σ = L: tokens see those of their own document; one, if they see all L


Row = tuple[Sample, ...]
"""Samples one after another, Σ L ≤ S; they do not see each other. One, but for packed rows."""


@dataclass(frozen=True)
class CorpusPlan:
    """What a run reads of one corpus, in nominal tokens or in examples."""

    name: str
    unit: str
    size: int  # that can be trained on
    run_size: int
    share: float  # of the run

    @property
    def epochs(self) -> float:
        return self.run_size / self.size


class TrainingData(ABC):
    """A run's corpora and tokenizer, checked against each other and the model, in the run's order.

    The order is that of a run that begins with this config; `at` gives that of a run that goes on.
    """

    corpora: list[Corpus]
    unit = "tokens"

    def __init__(self, config: Config) -> None:
        """
        Raises:
            UserError: the tokenizer is missing or damaged, or the model's vocabulary too small for it.
        """
        self.config = config
        self.sequence_length = config.data.sequence_length  # of validation rows
        self.block_length = config.block_length
        with under_key("data.tokenizer"):
            self.tokenizer = Tokenizer.load(config.data.tokenizer)
        self._vocab_size = config.model.vocab_size
        if self.tokenizer.vocab_size > self._vocab_size:
            raise UserError(
                f"model.vocab_size {self._vocab_size} is too small: {config.data.tokenizer} has "
                f"{self.tokenizer.vocab_size} ids; set model.vocab_size to at least that"
            )
        self.names = short_names([corpus.path for corpus in config.data.corpora])

    @property
    @abstractmethod
    def _sizes(self) -> list[int]:
        """Of what can be trained on in each corpus: what `temperature` reckons with."""

    @property
    @abstractmethod
    def blocks_per_corpus(self) -> list[int]:
        """Training blocks of each corpus, of `block_length` tokens: what one epoch over it reads."""

    @property
    @abstractmethod
    def validation_counts(self) -> list[int]:
        """Validation rows of each corpus."""

    def packing(self, first_sample: int) -> list[list[int]]:
        """The samples of each row of the global batch that begins at `first_sample`; the same on every rank."""
        size = self.timeline.phase(first_sample).global_batch_size
        return [[g] for g in range(first_sample, first_sample + size)]

    @abstractmethod
    def samples(self, first_sample: int, numbers: Sequence[int]) -> list[Sample]:
        """The samples `numbers` of the global batch that begins at `first_sample`, with their noise.

        Weights are normalised over the whole global batch.

        Raises:
            UserError: a token id that the model has no embedding for.
        """

    @abstractmethod
    def validation_samples(self, numbers: Sequence[int]) -> list[Sample]:
        """Some of the validation rows, by their numbers, with the same noise every time. Raises as `samples`."""

    @property
    @abstractmethod
    def validation_t(self) -> np.ndarray:
        """[M] mask probability of each validation row."""

    @abstractmethod
    def check(self) -> None:
        """What training needs of the corpora beyond being there; some reads of each, so that one rank does it for all.

        Raises:
            UserError: it is not so.
        """

    @property
    def description(self) -> list[str]:
        """What the user should look at before the run begins."""
        return []

    def timeline_after(self, past: Sequence[Phase] = (), consumed_samples: int = 0) -> Timeline:
        """The timeline of a run that recorded the phases `past`; the sizes of the corpora are known here."""
        temperature, sizes = self.config.data.temperature, self._sizes
        factors = [1.0] * len(sizes)
        if temperature is not None:
            # Rounded, since the last bits of a power are the processor's own.
            factors = [float(f"{(size / max(sizes)) ** (1 / temperature):.12g}") for size in sizes]
        return Timeline(self.config, past, consumed_samples, factors)

    def at(self, timeline: Timeline) -> Self:
        """The same data in the order of a run with this timeline; nothing is opened again."""
        data = copy(self)
        data._follow(timeline)
        return data

    def _follow(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._order = Order(self.blocks_per_corpus, timeline.mixtures, self.config.seed)

    def counted(self, corpus: CorpusIdentity) -> str:
        """What it holds, in words."""
        return f"{corpus.documents:,} documents with {corpus.tokens:,} tokens"

    @property
    def identities(self) -> list[CorpusIdentity]:
        """What tells the corpora from others."""
        return [corpus.identity for corpus in self.corpora]

    @property
    def files(self) -> list[dict[str, tuple[int, int]]]:
        """Of each corpus its files with their tokens and documents: what all ranks have to agree on."""
        return [corpus.files for corpus in self.corpora]

    @property
    def plan(self) -> list[CorpusPlan]:
        """What the whole run reads of each corpus, samples that it passes over included."""
        end = self.timeline.tokens(self.timeline.end_samples)
        blocks, rest = divmod(end, self.block_length)
        tokens = self._order.counts_before(blocks) * self.block_length
        if rest:
            tokens[self._order.locate([blocks]).corpus[0]] += rest
        in_tokens = self.unit == "tokens"
        each, per = (self.block_length, 1) if in_tokens else (1, self.block_length)
        return [
            CorpusPlan(name, self.unit, size * each, read // per, read / end)
            for name, size, read in zip(self.names, self.blocks_per_corpus, tokens.tolist(), strict=True)
        ]

    def _check_batches(self, phase: Phase) -> None:
        """Every batch would hold rows of a corpus twice that has fewer of them than a batch takes."""
        total = sum(phase.weights)
        for name, weight, blocks in zip(self.names, phase.weights, self.blocks_per_corpus, strict=True):
            rows = blocks * self.block_length // phase.sequence_length
            taken = phase.global_batch_size * weight / total
            if taken > rows:
                raise UserError(
                    f"{name}: has {rows:,} rows of {phase.sequence_length} tokens, but every batch of "
                    f"{phase.global_batch_size:,} takes {taken:,.0f} of them: the same row would come more than once "
                    "in one step; use a larger corpus, or lower its weight or the global batch size"
                )

    def _check_ids(self, corpus: Corpus, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise UserError(
                f"{corpus.prefix}: holds token id {low if low < 0 else high}, but model.vocab_size is "
                f"{self._vocab_size}; the corpus is damaged or was made with another tokenizer: tokenize it again"
            )

    def _shares(self, held_out: Sequence[int]) -> list[int]:
        """Validation rows of corpora that have so many to give: validation.sequences together, or all there are.

        Each corpus that holds some out gives the same number, as far as it has them.
        """
        counts, given = [0] * len(held_out), 0
        there = sorted((rows, c) for c, rows in enumerate(held_out) if rows)
        for i, (rows, c) in enumerate(there):
            counts[c] = min(rows, (self.config.validation.sequences - given) // (len(there) - i))
            given += counts[c]
        return counts


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    parts = [path.split("/") for path in paths]
    for length in count(1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError
