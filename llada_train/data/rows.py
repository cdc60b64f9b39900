"""Pre-training rows: the documents of each corpus as one stream of tokens, cut into blocks and rows, without an index.

The last `validation_documents` of a corpus are held out. The documents before them are the training stream, the
held-out ones the validation stream; each is cut by itself, so that no training row holds a held-out token. Documents
run on across rows, and a row attends across their borders (paper App. B.1). The training stream is cut into the blocks
that the order permutes, and each block into rows of the length in force; the validation stream into rows of
data.sequence_length, which stay the same whatever the schedule says. Less than one piece at a stream's end is left out.
"""

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llada_train.config.errors import UserError
from llada_train.config.schema import Config, CorpusConfig
from llada_train.data.corpus import Corpus
from llada_train.data.order import BlockIndex, Order
from llada_train.data.timeline import Timeline
from llada_train.data.tokenizer import Tokenizer

SAMPLED_PIECES = 16  # of each stream, looked at when it is opened


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

    def tokens(self, piece: int, offset: int, length: int) -> np.ndarray:
        """`length` tokens of a piece from its token `offset` on."""
        first = self.start + piece * self.piece_length + offset
        return self.corpus.tokens(first, first + length)


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
        self.sequence_length = config.data.sequence_length  # of validation rows
        self.block_length = config.block_length
        self.tokenizer = Tokenizer.load(config.data.tokenizer)
        self._vocab_size = config.model.vocab_size
        if self.tokenizer.vocab_size > self._vocab_size:
            raise UserError(
                f"model.vocab_size {self._vocab_size} is too small: {config.data.tokenizer} has "
                f"{self.tokenizer.vocab_size} ids; set model.vocab_size to at least that"
            )
        opened = [self._open(corpus, config) for corpus in config.data.corpora]
        self._training = [training for training, _ in opened]
        self._held_out = [held_out for _, held_out in opened if held_out is not None]
        self._validation_sequences = config.validation.sequences
        self._seed = config.seed
        self._follow(Timeline(config))

    def at(self, timeline: Timeline) -> "PretrainingData":
        """The same data in the order of a run with this timeline; nothing is opened again."""
        data = copy(self)
        data._follow(timeline)
        return data

    def _follow(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._order = Order(self.blocks_per_corpus, timeline.mixtures, self._seed)

    @property
    def blocks_per_corpus(self) -> list[int]:
        """Training blocks of each corpus, of `block_length` tokens: what one epoch over it reads."""
        return [stream.num_pieces for stream in self._training]

    def training_rows(self, samples: npt.ArrayLike) -> np.ndarray:
        """The clean tokens of the samples g [n], of one sequence length S: int64 [n, S].

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        span = self.timeline.locate(samples)
        (length,) = np.unique(span.length).tolist()
        return self._training_tokens(self._order.locate(span.block), span.offset, length)

    def training_blocks(self, blocks: npt.ArrayLike) -> np.ndarray:
        """The clean tokens of the run's blocks [n], in its order: int64 [n, block_length].

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        place = self._order.locate(blocks)
        return self._training_tokens(place, np.zeros_like(place.block), self.block_length)

    def _training_tokens(self, place: BlockIndex, offset: np.ndarray, length: int) -> np.ndarray:
        pieces = zip(place.corpus.tolist(), place.block.tolist(), offset.tolist(), strict=True)
        return self._read([(self._training[c], block, first) for c, block, first in pieces], length)

    @cached_property
    def validation_rows(self) -> np.ndarray:
        """The clean tokens of the validation rows: int64 [M, S]; M = 0 where no corpus holds documents out.

        M is validation.sequences, or all held-out rows where there are fewer. Each corpus gives the same number, as far
        as it has them, spread evenly over its held-out stream.

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        rows: list[tuple[_Stream, int, int]] = []
        smallest_first = sorted(self._held_out, key=lambda stream: stream.num_pieces)
        for i, stream in enumerate(smallest_first):
            share = min(stream.num_pieces, (self._validation_sequences - len(rows)) // (len(smallest_first) - i))
            rows += [(stream, k * stream.num_pieces // share, 0) for k in range(share)]
        return self._read(rows, self.sequence_length)

    def _open(self, settings: CorpusConfig, config: Config) -> tuple[_Stream, _Stream | None]:
        """The training and the held-out stream of one corpus."""
        corpus = Corpus(settings.path)
        manifest, held_out = corpus.manifest, settings.validation_documents
        if manifest is not None and manifest.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{settings.path}: was not tokenized with {config.data.tokenizer} (fingerprint "
                f"{manifest.tokenizer_fingerprint[:12]}, the tokenizer's is {self.tokenizer.fingerprint[:12]}); set "
                "data.tokenizer to the folder it was made with, or tokenize again"
            )
        if manifest is not None and manifest.eos_id != self.tokenizer.eos_id:
            raise UserError(
                f"{settings.path}: its documents end in token {manifest.eos_id}, but the end-of-text token of "
                f"{config.data.tokenizer} is {self.tokenizer.eos_id}; mend tokenizer_config.json, or tokenize again"
            )
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
        self._check(training, documents, "block_length" if block else "sequence_length", "use a larger corpus")
        if validation is not None:
            documents = f"{held_out} held-out documents"
            self._check(validation, documents, "sequence_length", "raise validation_documents")
        return training, validation

    def _check(self, stream: _Stream, documents: str, setting: str, remedy: str) -> None:
        if not stream.num_pieces:
            piece = "block" if setting == "block_length" else "row"
            raise UserError(
                f"{stream.corpus.prefix}: the {documents} have {stream.stop - stream.start} tokens, less than one "
                f"{piece} of data.{setting} {stream.piece_length}; {remedy}, or lower data.{setting}"
            )
        count = min(SAMPLED_PIECES, stream.num_pieces)
        self._read([(stream, k * stream.num_pieces // count, 0) for k in range(count)], stream.piece_length)

    def _read(self, places: list[tuple[_Stream, int, int]], length: int) -> np.ndarray:
        """The first so many tokens at each (stream, piece, offset): int64 [n, length]."""
        tokens = np.empty((len(places), length), np.int64)
        for i, (stream, piece, offset) in enumerate(places):
            tokens[i] = stream.tokens(piece, offset, length)
            low, high = int(tokens[i].min()), int(tokens[i].max())
            if low < 0 or high >= self._vocab_size:
                raise UserError(
                    f"{stream.corpus.prefix}: holds token id {low if low < 0 else high}, but model.vocab_size is "
                    f"{self._vocab_size}; the corpus is damaged or was made with another tokenizer: tokenize it again"
                )
        return tokens
