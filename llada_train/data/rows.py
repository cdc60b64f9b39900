"""Pre-training rows: the documents of each corpus as one stream of tokens, cut into blocks and rows, without an index.

The last `validation_documents` of a corpus are held out. The documents before them are the training stream, the
held-out ones the validation stream; each is cut by itself, so that no training row holds a held-out token. Documents
run on across rows (paper App. B.1). The training stream is cut into the blocks that the order permutes, and each block
into rows of the length in force; the validation stream into rows of data.sequence_length, which stay the same whatever
the schedule says. Less than one piece at a stream's end is left out.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llada_train.config.errors import UserError, under_key
from llada_train.config.schema import Config, CorpusConfig
from llada_train.data.corpus import Corpus, Manifest
from llada_train.data.order import BlockIndex
from llada_train.data.training_data import Sample, TrainingData
from llada_train.objective.forward_process import Noise, training_noise, validation_noise

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


class PretrainingData(TrainingData):
    """Tokenized corpora, and their rows in the run's order."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            UserError: a corpus or the tokenizer is missing or damaged, they do not belong together, the model's
                vocabulary is too small for them, or a corpus is too small to train on or to hold documents out of.
        """
        super().__init__(config)
        # Opening waits for file systems far away, so many are opened at once; which is at fault first is the config's
        # order all the same.
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            opened = list(pool.map(self._open, range(len(config.data.corpora)), config.data.corpora))
        self.corpora = [training.corpus for training, _ in opened]
        self._training = [training for training, _ in opened]
        self._held_out = [held_out for _, held_out in opened]
        self._check_distinct()
        self._follow(self.timeline_after())

    @property
    def _sizes(self) -> list[int]:
        return [stream.stop - stream.start for stream in self._training]

    @property
    def blocks_per_corpus(self) -> list[int]:
        """Training blocks of each corpus, of `block_length` tokens: what one epoch over it reads."""
        return [stream.num_pieces for stream in self._training]

    def samples(self, first_sample: int, numbers: Sequence[int]) -> list[Sample]:
        phase = self.timeline.phase(first_sample)
        noise = training_noise(
            self.config.seed, first_sample, phase.global_batch_size, phase.sequence_length, self.config.objective
        )
        tokens = self.training_rows(numbers)
        return [self._sample(row, noise, g - first_sample) for row, g in zip(tokens, numbers, strict=True)]

    def _sample(self, tokens: np.ndarray, noise: Noise, i: int) -> Sample:
        tokens = tokens[: noise.lengths[i]]
        return Sample(
            sample_index=noise.first_sample + i,
            tokens=tokens,
            mask=noise.mask(i),
            mask_probability=float(noise.mask_probability[i]),
            loss_weight=float(noise.loss_weight[i]),
            document_lengths=self.document_lengths(tokens),
        )

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
        if self.config.data.rows == "packed":
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
        return self.corpora[corpus].num_documents - self.config.data.corpora[corpus].validation_documents

    @cached_property
    def validation_counts(self) -> list[int]:
        """Validation rows of each corpus.

        Together they are validation.sequences, or all held-out rows where there are fewer: each corpus that holds
        documents out gives the same number, as far as it has them.
        """
        return self._shares([stream.num_pieces if stream is not None else 0 for stream in self._held_out])

    @cached_property
    def _validation_noise(self) -> Noise:
        config = self.config
        return validation_noise(config.seed, self.validation_counts, self.sequence_length, config.objective.epsilon)

    @property
    def validation_t(self) -> np.ndarray:
        return self._validation_noise.mask_probability

    def validation_samples(self, numbers: Sequence[int]) -> list[Sample]:
        tokens = self.read_validation_rows(numbers)
        return [self._sample(row, self._validation_noise, i) for row, i in zip(tokens, numbers, strict=True)]

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

    def _open(self, number: int, settings: CorpusConfig) -> tuple[_Stream, _Stream | None]:
        """The training and the held-out stream of one corpus."""
        config, held_out = self.config, settings.validation_documents
        with under_key(f"data.corpora.{number}.path"):
            corpus = Corpus(settings.path)
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
        tokenizer = self.config.data.tokenizer
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

    def _check_token_counts(self) -> None:
        """Where tokens are asked for, the mixture gives them, to a hundredth; its shares are multiples of 2^-18."""
        for corpus, plan in zip(self.config.data.corpora, self.plan, strict=True):
            asked = corpus.tokens or 0
            step = self.timeline.phase(0).tokens_per_step
            if asked and abs(plan.run_size - asked) > max(asked / 100, step):
                raise UserError(
                    f"{corpus.path}: is to give {asked:,} tokens of the run, but the mixture would take "
                    f"{plan.run_size:,}: shares are multiples of 1/262,144; ask for more, or put it into another "
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


def _check_size(stream: _Stream, documents: str, setting: str, remedy: str) -> None:
    if not stream.num_pieces:
        piece = "block" if setting == "block_length" else "row"
        raise UserError(
            f"{stream.corpus.prefix}: the {documents} have {stream.stop - stream.start} tokens, less than one "
            f"{piece} of data.{setting} {stream.piece_length}; {remedy}, or lower data.{setting}"
        )
