"""What is wrong with a corpus, and what is in it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from llada_train.config.errors import UserError
from llada_train.data.corpus import Corpus, Manifest
from llada_train.data.corpus_writer import CorpusWriter, token_dtype
from llada_train.data.indexed import CHUNK, IndexedFile
from llada_train.data.storage import open_file
from llada_train.data.tokenizer import Tokenizer

Advance = Callable[[int], None]  # bytes of the .bin that are done


@dataclass(frozen=True)
class Expected:
    """Of a corpus, by its tokenizer or its manifest."""

    vocab_size: int
    eos_id: int


def expected(manifest: Manifest | None, tokenizer: Tokenizer | None, prefix: str) -> Expected:
    """What the tokenizer says, else the manifest.

    Raises:
        UserError: there is neither, or they do not belong together.
    """
    if tokenizer is not None:
        if manifest is not None and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(f"{prefix}: was made with another tokenizer; give the one it was made with")
        return Expected(tokenizer.vocab_size, tokenizer.eos_id)
    if manifest is None:
        raise UserError(f"{prefix}: has no manifest ({prefix}.json) that says what its ids are; give its --tokenizer")
    return Expected(manifest.vocab_size, manifest.eos_id)


def verify(corpus: Corpus, tokenizer: Tokenizer | None, advance: Advance = lambda size: None) -> Iterator[str]:
    """Each fault that reading all of a corpus shows: structure, ids, EOS, checksums.

    Raises:
        UserError: it cannot be read at all, or there is nothing to compare it with.
    """
    wanted = {prefix: expected(corpus.manifests.get(prefix), tokenizer, prefix) for prefix in corpus.files}
    for prefix in corpus.files:
        yield from _verify_file(IndexedFile(prefix), corpus.manifests.get(prefix), wanted[prefix], advance)


def _verify_file(file: IndexedFile, manifest: Manifest | None, wanted: Expected, advance: Advance) -> Iterator[str]:
    if (damage := file.damage()) is not None:
        yield damage
        return
    scan = _Scan(wanted)
    position = 0
    for _, lengths in _documents(file):
        ends = position + np.cumsum(lengths)
        for start in range(position, int(ends[-1]), CHUNK):
            tokens = file.tokens(start, min(start + CHUNK, int(ends[-1])))
            scan.tokens(start, tokens)
            here = (lengths > 0) & (ends > start) & (ends <= start + len(tokens))
            scan.last_tokens(tokens[ends[here] - 1 - start])
            advance(tokens.nbytes)
        scan.empty += int((lengths == 0).sum())
        position = int(ends[-1])
    for fault in scan.faults(file.num_documents):
        yield f"{file.prefix}: {fault}"
    yield from _wrong_checksums(file.prefix, manifest, scan.digest.hexdigest())


class _Scan:
    """Counts over all tokens of a corpus."""

    def __init__(self, wanted: Expected) -> None:
        self._wanted = wanted
        self.digest = hashlib.sha256()
        self.empty = self._ended = self._without_eos = self._eos = self._outside = 0
        self._first_outside: str | None = None

    def tokens(self, start: int, tokens: np.ndarray) -> None:
        """Those from token `start` on."""
        self.digest.update(tokens.tobytes())
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self._wanted.vocab_size))
        if len(wrong) and not self._outside:
            self._first_outside = f"{tokens[wrong[0]]}, token {start + wrong[0]:,}"
        self._outside += len(wrong)
        self._eos += int((tokens == self._wanted.eos_id).sum())

    def last_tokens(self, tokens: np.ndarray) -> None:
        """Those of documents."""
        self._ended += len(tokens)
        self._without_eos += int((tokens != self._wanted.eos_id).sum())

    def faults(self, documents: int) -> Iterator[str]:
        if self._outside:
            yield (
                f"{self._outside:,} ids are not below {self._wanted.vocab_size:,}, the size of the vocabulary; the "
                f"first is {self._first_outside}"
            )
        if self.empty:
            yield f"{self.empty:,} of {documents:,} documents are empty"
        if self._without_eos:
            yield (
                f"{self._without_eos:,} of {documents:,} documents do not end in EOS ({self._wanted.eos_id}); "
                "`llada-data add-eos` makes a corpus of which all do"
            )
        if (inside := self._eos - (self._ended - self._without_eos)) > 0:
            yield f"{inside:,} EOS are inside documents"


def add_eos(prefix: str | Path, output: Path, tokenizer: Tokenizer, advance: Advance = lambda size: None) -> int:
    """Write the documents of a corpus to `output`, each with an EOS; how many lacked it. Empty ones are left out.

    Raises:
        UserError: the corpus cannot be read, or an id is not the tokenizer's.
    """
    file = IndexedFile(str(prefix))
    dtype = token_dtype(tokenizer.vocab_size)
    added = position = 0
    with CorpusWriter(output, dtype) as writer:
        for _, lengths in _documents(file):
            for length in lengths.tolist():
                tokens = file.tokens(position, position + length)
                position += length
                if not length:
                    continue
                if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
                    raise UserError(
                        f"{prefix}: has id {tokens.max()}, but the tokenizer has {tokenizer.vocab_size:,} ids: "
                        "give the one it was made with"
                    )
                if tokens[-1] != tokenizer.eos_id:
                    tokens = np.append(tokens, tokenizer.eos_id)
                    added += 1
                writer.add_document(tokens)
                advance(length * file.dtype.itemsize)
    return added


def length_histogram(corpus: Corpus) -> list[tuple[int, int, int]]:
    """(length, documents, tokens) of the documents of length/2 < tokens ≤ length, for the powers of two there are."""
    counts: dict[int, tuple[int, int]] = {}
    for _, lengths in chain.from_iterable(_documents(IndexedFile(prefix)) for prefix in corpus.files):
        powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
        for power in np.unique(powers).tolist():
            of_power = lengths[powers == power]
            documents, tokens = counts.get(power, (0, 0))
            counts[power] = documents + len(of_power), tokens + int(of_power.sum())
    return [(2**power, *counts[power]) for power in sorted(counts)]


def samples(corpus: Corpus, tokenizer: Tokenizer, count: int, tokens: int) -> list[tuple[int, str]]:
    """(document, its beginning as text) of documents spread evenly over the corpus."""
    found = []
    for i in sorted({corpus.num_documents * i // count for i in range(count)}):
        start, end = corpus.document_start(i), corpus.document_start(i + 1)
        text = tokenizer.decode(corpus.tokens(start, min(end, start + tokens)).tolist(), keep_special=True)
        found.append((i, text if end - start <= tokens else text + " …"))
    return found


def _documents(file: IndexedFile) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, lengths) of stretches of documents, in order."""
    for first in range(0, file.num_documents, CHUNK):
        yield first, file.document_lengths(first, min(first + CHUNK, file.num_documents))


def _wrong_checksums(prefix: str, manifest: Manifest | None, bin_digest: str) -> Iterator[str]:
    if manifest is None or manifest.checksums is None:
        return
    index, idx_hash = open_file(f"{prefix}.idx"), hashlib.sha256()
    for start in range(0, index.size, CHUNK * 8):
        idx_hash.update(index.read(start, min(CHUNK * 8, index.size - start)))
    for path, found, stated in (
        (f"{prefix}.bin", bin_digest, manifest.checksums.bin),
        (f"{prefix}.idx", idx_hash.hexdigest(), manifest.checksums.idx),
    ):
        if found != stated:
            yield f"{path}: its sha256 is {found}, but was {stated} when it was made"
