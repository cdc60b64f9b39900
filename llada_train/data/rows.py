"""Pre-training rows: the documents of each corpus as one stream of tokens, cut into rows of S, without an index.

The last `validation_documents` of a corpus are held out. The documents before them are the training stream, the
held-out ones the validation stream; each is cut by itself, so that no training row holds a held-out token. Documents
run on across rows, and a row attends across their borders (paper App. B.1). Less than one row at a stream's end is left
out.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llada_train.config.errors import UserError
from llada_train.config.schema import Config, CorpusConfig
from llada_train.data.corpus import Corpus
from llada_train.data.order import Order
from llada_train.data.tokenizer import Tokenizer

SAMPLED_ROWS = 16  # of each corpus, looked at when it is opened


@dataclass(frozen=True)
class _Stream:
    """Tokens [start, stop) of a corpus, cut into rows."""

    corpus: Corpus
    start: int
    stop: int
    sequence_length: int

    @property
    def num_rows(self) -> int:
        return (self.stop - self.start) // self.sequence_length

    def row(self, i: int) -> np.ndarray:
        first = self.start + i * self.sequence_length
        return self.corpus.tokens(first, first + self.sequence_length)


class PretrainingData:
    """A run's corpora and tokenizer, checked against each other and the model, and their rows in the run's order."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            UserError: a corpus or the tokenizer is missing or damaged, they do not belong together, the model's
                vocabulary is too small for them, or a corpus is too small to train on or to hold documents out of.
        """
        self.sequence_length = config.data.sequence_length
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
        self._order = Order(
            [stream.num_rows for stream in self._training],
            [corpus.weight for corpus in config.data.corpora],
            config.seed,
        )

    @property
    def rows_per_corpus(self) -> list[int]:
        """Training rows of each corpus: samples of one epoch over it."""
        return [stream.num_rows for stream in self._training]

    def training_rows(self, samples: npt.ArrayLike) -> np.ndarray:
        """The clean tokens of the samples at places g [n] of the run's order: int64 [n, S].

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        place = self._order.locate(samples)
        return self._read([(self._training[c], int(row)) for c, row in zip(place.corpus, place.row, strict=True)])

    @cached_property
    def validation_rows(self) -> np.ndarray:
        """The clean tokens of the validation rows: int64 [M, S]; M = 0 where no corpus holds documents out.

        M is validation.sequences, or all held-out rows where there are fewer. Each corpus gives the same number, as far
        as it has them, spread evenly over its held-out stream.

        Raises:
            UserError: a token id that the model has no embedding for.
        """
        rows: list[tuple[_Stream, int]] = []
        smallest_first = sorted(self._held_out, key=lambda stream: stream.num_rows)
        for i, stream in enumerate(smallest_first):
            share = min(stream.num_rows, (self._validation_sequences - len(rows)) // (len(smallest_first) - i))
            rows += [(stream, k * stream.num_rows // share) for k in range(share)]
        return self._read(rows)

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
        training = _Stream(corpus, 0, border, self.sequence_length)
        validation = _Stream(corpus, border, corpus.num_tokens, self.sequence_length) if held_out else None
        self._check(training, f"{corpus.num_documents - held_out} training documents", "use a larger corpus")
        if validation is not None:
            self._check(validation, f"{held_out} held-out documents", "raise validation_documents")
        return training, validation

    def _check(self, stream: _Stream, documents: str, remedy: str) -> None:
        if not stream.num_rows:
            raise UserError(
                f"{stream.corpus.prefix}: the {documents} have {stream.stop - stream.start} tokens, less than one row "
                f"of data.sequence_length {self.sequence_length}; {remedy}, or lower data.sequence_length"
            )
        count = min(SAMPLED_ROWS, stream.num_rows)
        self._read([(stream, k * stream.num_rows // count) for k in range(count)])

    def _read(self, rows: list[tuple[_Stream, int]]) -> np.ndarray:
        tokens = np.empty((len(rows), self.sequence_length), np.int64)
        for i, (stream, row) in enumerate(rows):
            tokens[i] = stream.row(row)
            low, high = int(tokens[i].min()), int(tokens[i].max())
            if low < 0 or high >= self._vocab_size:
                raise UserError(
                    f"{stream.corpus.prefix}: holds token id {low if low < 0 else high}, but model.vocab_size is "
                    f"{self._vocab_size}; the corpus is damaged or was made with another tokenizer: tokenize it again"
                )
        return tokens
