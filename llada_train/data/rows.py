"""Pre-training rows: the documents of each corpus as one stream of tokens, cut into blocks and rows, without an index.

The last `validation_documents` of a corpus are held out. The documents before them are the training stream, the
held-out ones the validation stream; each is cut by itself, so that no training row holds a held-out token. Documents
run on across rows (paper App. B.1). The training stream is cut into the blocks that the order permutes, and each block
into rows of the length in force; the validation stream into rows of data.sequence_length, which stay the same whatever
the schedule says. Less than one piece at a stream's end is left out.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llada_train.config.errors import UserError
from llada_train.config.schema import Config, CorpusConfig
from llada_train.data.corpus import Corpus, CorpusIdentity, Manifest
from llada_train.data.order import BlockIndex, Order
from llada_train.data.timeline import Phase, Timeline
from llada_train.data.tokenizer import Tokenizer

OPENED_AT_ONCE = 16  # corpora


@dataclass(frozen=True)
class _Stream:
    """Tokens [start, stop) of a corpus, cut into pieces: blocks or rows."""

    corpus: Corpus
    start: int
    stop: int
    piece_length: int

    @property
    def num_pieces(self) -> int:
        return (self.stop - self.start) // self.piece_length


class Stretch(NamedTuple):
    """Tokens [start, stop) of a corpus's stream, and the epoch that reads them."""

    corpus: int  # its place in data.corpora
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class CorpusPlan:
    """What a run reads of one corpus; nominal tokens."""

    name: str
    corpus_tokens: int  # that can be trained on
    run_tokens: int
    share: float  # of the run's tokens

    @property
    def epochs(self) -> float:
        return self.run_tokens / self.corpus_tokens


class PretrainingData:
    """A run's corpora and tokenizer, checked against each other and the model, and their rows in the run's order.

    The order is that of a run that begins with this config; `at` gives that of a run that goes on.
    """

    def __init__(self, config: Config) -> None:
        """
        Raises:
            UserError: a corpus or the tokenizer is missing or damaged, they do not belong together, the model's
                vocabulary is too small for them, or a corpus is too small to train on or to hold documents out of.
        """
        self._config = config
        self.sequence_length = config.data.sequence_length  # of validation rows
        self.block_length = config.block_length
        self.tokenizer = Tokenizer.load(config.data.tokenizer)
        self._vocab_size = config.model.vocab_size
        if self.tokenizer.vocab_size > self._vocab_size:
            raise UserError(
                f"model.vocab_size {self._vocab_size} is too small: {config.data.tokenizer} has "
                f"{self.tokenizer.vocab_size} ids; set model.vocab_size to at least that"
            )
        # Opening waits for file systems far away, so many are opened at once; which is at fault first is the config's
        # order all the same.
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            opened = list(pool.map(self._open, config.data.corpora))
        self.corpora = [training.corpus for training, _ in opened]
        self.names = short_names([corpus.path for corpus in config.data.corpora])
        self._training = [training for training, _ in opened]
        self._held_out = [held_out for _, held_out in opened]
        self._check_distinct()
        self._follow(self.timeline_after())

    def timeline_after(self, past: Sequence[Phase] = (), consumed_samples: int = 0) -> Timeline:
        """The timeline of a run that recorded the phases `past`; the sizes of the corpora are known here."""
        temperature = self._config.data.temperature
        sizes = [stream.stop - stream.start for stream in self._training]
        factors = [1.0] * len(sizes)
        if temperature is not None:
            # Rounded, since the last bits of a power are the processor's own.
            factors = [float(f"{(size / max(sizes)) ** (1 / temperature):.12g}") for size in sizes]
        return Timeline(self._config, past, consumed_samples, factors)

    def at(self, timeline: Timeline) -> "PretrainingData":
        """The same data in the order of a run with this timeline; nothing is opened again."""
        data = copy(self)
        data._follow(timeline)
        return data

    def _follow(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._order = Order(self.blocks_per_corpus, timeline.mixtures, self._config.seed)

    @property
    def blocks_per_corpus(self) -> list[int]:
        """Training blocks of each corpus, of `block_length` tokens: what one epoch over it reads."""
        return [stream.num_pieces for stream in self._training]

    @property
    def identities(self) -> list[CorpusIdentity]:
        """What tells the corpora from others."""
        return [corpus.identity for corpus in self.corpora]

    @property
    def plan(self) -> list[CorpusPlan]:
        """What the whole run reads of each corpus, samples that it passes over included."""
        end = self.timeline.tokens(self.timeline.end_samples)
        blocks, rest = divmod(end, self.block_length)
        tokens = self._order.counts_before(blocks) * self.block_length
        if rest:
            tokens[self._order.locate([blocks]).corpus[0]] += rest
        sizes = [size * self.block_length for size in self.blocks_per_corpus]
        return [
            CorpusPlan(name, size, read, read / end)
            for name, size, read in zip(self.names, sizes, tokens.tolist(), strict=True)
        ]

    def training_stretches(self, samples: npt.ArrayLike) -> list[Stretch]:
        """Where the tokens of the samples g [n] lie."""
        span = self.timeline.locate(samples)
        return self._stretches(self._order.locate(span.block), span.offset, span.length)

    def training_rows(self, samples: npt.ArrayLike) -> np.ndarray:
        """The clean tokens of the samples g [n], of one sequence length S: int64 [n, S].

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        return self._read(self.training_stretches(samples))

    def training_blocks(self, blocks: npt.ArrayLike) -> np.ndarray:
        """The clean tokens of the run's blocks [n], in its order: int64 [n, block_length].

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        place = self._order.locate(blocks)
        return self._read(
            self._stretches(place, np.zeros_like(place.block), np.full_like(place.block, self.block_length))
        )

    def document_lengths(self, tokens: np.ndarray) -> tuple[int, ...]:
        """What tokens of a row [L] attend within: their documents, each with its EOS, or, if packed, the whole row.

        Where a row begins or ends within a document, the part of it in the row is a document.
        """
        if self._config.data.rows == "packed":
            return (len(tokens),)
        ends = np.flatnonzero(tokens == self.tokenizer.eos_id) + 1
        return tuple(np.diff(np.unique([0, *ends.tolist(), len(tokens)])).tolist())

    def uses(self, corpus: int, start: int, stop: int) -> list[int]:
        """The samples of the run whose rows hold some of the tokens [start, stop) of a corpus, in order.

        A row that is cut to a random length may end before them.
        """
        stream, length = self._training[corpus], self.block_length
        first, last = max(start, stream.start) - stream.start, min(stop, stream.stop) - stream.start
        if first >= last:
            return []
        blocks = -(-self.timeline.tokens(self.timeline.end_samples) // length)
        found: set[int] = set()
        for block in range(first // length, min(-(-last // length), stream.num_pieces)):
            within = max(first - block * length, 0), min(last - block * length, length)
            for run_block in self._order.occurrences(corpus, block, blocks):
                found.update(self.timeline.samples_of(run_block, *within))
        return sorted(found)

    def trained_documents(self, corpus: int) -> int:
        """Documents of a corpus that are not held out: its first ones."""
        return self.corpora[corpus].num_documents - self._config.data.corpora[corpus].validation_documents

    @cached_property
    def validation_counts(self) -> list[int]:
        """Validation rows of each corpus.

        Together they are validation.sequences, or all held-out rows where there are fewer: each corpus that holds
        documents out gives the same number, as far as it has them.
        """
        counts, given = [0] * len(self._held_out), 0
        held_out = [(stream.num_pieces, c) for c, stream in enumerate(self._held_out) if stream is not None]
        for i, (pieces, c) in enumerate(sorted(held_out)):
            counts[c] = min(pieces, (self._config.validation.sequences - given) // (len(held_out) - i))
            given += counts[c]
        return counts

    @cached_property
    def validation_rows(self) -> np.ndarray:
        """The clean tokens of the validation rows, those of one corpus after another: int64 [M, S].

        Each corpus's are spread evenly over its held-out stream. M = 0 where no corpus holds documents out.

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        return self.read_validation_rows(range(sum(self.validation_counts)))

    def read_validation_rows(self, rows: Sequence[int]) -> np.ndarray:
        """Some of `validation_rows`, by their numbers: int64 [n, S].

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        stretches: list[Stretch] = []
        for c, (stream, share) in enumerate(zip(self._held_out, self.validation_counts, strict=True)):
            if stream is not None:
                starts = [stream.start + k * stream.num_pieces // share * stream.piece_length for k in range(share)]
                stretches += [Stretch(c, 0, start, start + stream.piece_length) for start in starts]
        return self._read([stretches[row] for row in rows]) if rows else np.empty((0, self.sequence_length), np.int64)

    def check(self) -> None:
        """What training needs of the corpora beyond being there; some reads of each, so that one rank does it for all.

        Raises:
            UserError: a few places of a corpus hold ids that the model does not have, a few of its documents do not
                end in the end-of-text token, a batch takes more rows of a corpus than it has, or a corpus is to give
                so few tokens that the mixture cannot.
        """
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            list(pool.map(self._check_content, self.corpora))
        for phase in self.timeline.phases:
            self._check_batches(phase)
        self._check_token_counts()

    @property
    def files(self) -> list[dict[str, tuple[int, int]]]:
        """Of each corpus its files with their tokens and documents: what all ranks have to agree on."""
        return [corpus.files for corpus in self.corpora]

    def _check_distinct(self) -> None:
        """No file belongs to two corpora: what one holds out, the other would train on."""
        owners: dict[str, str] = {}
        for corpus in self.corpora:
            for prefix in corpus.files:
                file = f"{prefix}.bin" if corpus.remote else str(Path(f"{prefix}.bin").resolve())
                if owners.setdefault(file, corpus.prefix) != corpus.prefix:
                    raise UserError(
                        f"data.corpora: {file} belongs to {owners[file]} and to {corpus.prefix}; give each file once"
                    )

    def _check_content(self, corpus: Corpus) -> None:
        for tokens in corpus.sample:
            self._check_ids(corpus, tokens)
        eos, documents = self.tokenizer.eos_id, corpus.sampled_documents
        ends = corpus.document_ends(documents)
        without = [i for i, token in zip(documents, ends, strict=True) if token not in (eos, None)]
        if without:
            raise UserError(
                f"{corpus.prefix}: document {without[0]:,} does not end in the end-of-text token {eos} "
                f"({len(without)} of {len(documents)} looked at do not); `llada-data add-eos` gives it to them"
            )

    def _open(self, settings: CorpusConfig) -> tuple[_Stream, _Stream | None]:
        """The training and the held-out stream of one corpus."""
        config = self._config
        corpus, held_out = Corpus(settings.path), settings.validation_documents
        for prefix, manifest in corpus.manifests.items():
            self._check_tokenizer(prefix, manifest)
        if held_out >= corpus.num_documents:
            raise UserError(
                f"{settings.path}: validation_documents {held_out} leaves nothing to train on: the corpus has "
                f"{corpus.num_documents} documents; set it lower"
            )
        border = corpus.document_start(corpus.num_documents - held_out)
        training = _Stream(corpus, 0, border, self.block_length)
        validation = _Stream(corpus, border, corpus.num_tokens, self.sequence_length) if held_out else None
        documents = f"{corpus.num_documents - held_out} training documents"
        block = config.data.block_length is not None or config.block_length != self.sequence_length
        _check_size(training, documents, "block_length" if block else "sequence_length", "use a larger corpus")
        if validation is not None:
            documents = f"{held_out} held-out documents"
            _check_size(validation, documents, "sequence_length", "raise validation_documents")
        return training, validation

    def _check_tokenizer(self, prefix: str, manifest: Manifest) -> None:
        tokenizer = self._config.data.tokenizer
        if manifest.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{prefix}: was not tokenized with {tokenizer} (fingerprint "
                f"{manifest.tokenizer_fingerprint[:12]}, the tokenizer's is {self.tokenizer.fingerprint[:12]}); set "
                "data.tokenizer to the folder it was made with, or tokenize again"
            )
        if manifest.eos_id != self.tokenizer.eos_id:
            raise UserError(
                f"{prefix}: its documents end in token {manifest.eos_id}, but the end-of-text token of "
                f"{tokenizer} is {self.tokenizer.eos_id}; mend tokenizer_config.json, or tokenize again"
            )

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

    def _check_token_counts(self) -> None:
        """Where tokens are asked for, the mixture gives them, to a hundredth; its shares are multiples of 2^-18."""
        for corpus, plan in zip(self._config.data.corpora, self.plan, strict=True):
            asked = corpus.tokens or 0
            step = self.timeline.phase(0).tokens_per_step
            if asked and abs(plan.run_tokens - asked) > max(asked / 100, step):
                raise UserError(
                    f"{corpus.path}: is to give {asked:,} tokens of the run, but the mixture would take "
                    f"{plan.run_tokens:,}: shares are multiples of 1/262,144; ask for more, or put it into another "
                    "corpus"
                )

    def _stretches(self, place: BlockIndex, offset: np.ndarray, length: np.ndarray) -> list[Stretch]:
        starts = place.block * self.block_length + offset
        stretches = zip(*(a.tolist() for a in (place.corpus, place.epoch, starts, starts + length)), strict=True)
        return [
            Stretch(c, epoch, self._training[c].start + start, self._training[c].start + stop)
            for c, epoch, start, stop in stretches
        ]

    def _read(self, stretches: list[Stretch]) -> np.ndarray:
        """Their tokens, equally many of each: int64 [n, length]."""
        tokens = np.empty((len(stretches), stretches[0].stop - stretches[0].start), np.int64)
        for c in {stretch.corpus for stretch in stretches}:
            rows = [i for i, stretch in enumerate(stretches) if stretch.corpus == c]
            found = self.corpora[c].read([(stretches[i].start, stretches[i].stop) for i in rows])
            for i, row in zip(rows, found, strict=True):
                tokens[i] = row
                self._check_ids(self.corpora[c], tokens[i])
        return tokens

    def _check_ids(self, corpus: Corpus, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise UserError(
                f"{corpus.prefix}: holds token id {low if low < 0 else high}, but model.vocab_size is "
                f"{self._vocab_size}; the corpus is damaged or was made with another tokenizer: tokenize it again"
            )


def _check_size(stream: _Stream, documents: str, setting: str, remedy: str) -> None:
    if not stream.num_pieces:
        piece = "block" if setting == "block_length" else "row"
        raise UserError(
            f"{stream.corpus.prefix}: the {documents} have {stream.stop - stream.start} tokens, less than one "
            f"{piece} of data.{setting} {stream.piece_length}; {remedy}, or lower data.{setting}"
        )


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    parts = [path.split("/") for path in paths]
    for length in count(1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError
