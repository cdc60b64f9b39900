"""A tokenized corpus: PREFIX.bin and PREFIX.idx in Megatron's format (llada_train.data.indexed), and PREFIX.json.

PREFIX.json, the manifest, is ours; corpora made by Megatron's tools have none.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from llada_train.config.errors import UserError
from llada_train.data.indexed import CHUNK, DTYPE_CODES, HEADER, MAGIC, MAX_SEQUENCE_LENGTH, VERSION, IndexedFile
from llada_train.data.storage import exists, is_remote, matches, open_file

SAMPLED_PLACES, SAMPLED_LENGTH = 16, 1024  # of a corpus, looked at when it is opened
AT_ONCE = 32  # requests to a remote storage

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Checksums(BaseModel):
    """sha256, in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    bin: str
    idx: str
    inputs: str  # of PREFIX.inputs.sha256, which has the checksum of each input file


class Manifest(BaseModel):
    """What PREFIX.json says of a corpus: enough to check it against a tokenizer and to report bits per byte."""

    model_config = ConfigDict(frozen=True)

    documents: int
    tokens: int  # with the EOS after each document
    text_bytes: int  # of the documents, in UTF-8
    tokenizer_fingerprint: str
    vocab_size: int  # of the tokenizer: all ids are below
    dtype: str
    eos_id: int
    rejected: dict[str, int]  # reason → documents that were left out
    checksums: Checksums | None  # none for several corpora that are read as one

    @property
    def made_with(self) -> tuple[str, str, int]:
        """What the parts of one corpus share."""
        return self.tokenizer_fingerprint, self.dtype, self.eos_id

    def save(self, prefix: Path) -> None:
        """Write PREFIX.json, beside and renamed."""
        path, partial = _with_suffix(prefix, ".json"), _with_suffix(prefix, ".json.partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


class CorpusIdentity(BaseModel):
    """Of the corpus that a run began with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    documents: int
    sampled_sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron uses for `vocab_size` ids: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def corpus_files(prefix: Path) -> list[Path]:
    """The paths that a corpus at `prefix` consists of, whether or not they exist."""
    return [_with_suffix(prefix, suffix) for suffix in (".bin", ".idx", ".json")]


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.parent / (prefix.name + suffix)  # Path.with_suffix would cut "web.v2" to "web"


class CorpusWriter:
    """Writes PREFIX.bin and PREFIX.idx in memory that does not grow with the corpus.

    A context manager. The files appear under their names when the block ends, the .idx last, and replace any that were
    there; an exception leaves what was there before. Ending without a token is a UserError.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        """
        Raises:
            ValueError: Megatron's format has no code for `dtype`.
        """
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.num_documents = 0
        self.num_tokens = 0
        self.bin_hash, self.idx_hash = hashlib.sha256(), hashlib.sha256()
        """Of what has been written; of the .idx when the block has ended."""
        if self.dtype.name not in DTYPE_CODES.values():
            raise ValueError(f"no integer dtype of Megatron's format: {self.dtype}")

    def __enter__(self) -> Self:
        """Waits for another process that writes the same corpus.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        folder = self.prefix.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._bin = self._open_alone()
            self._lengths = TemporaryFile(dir=folder)
        except OSError as error:
            raise UserError(f"{self.prefix}: cannot be written: {error.strerror}") from None
        return self

    def _open_alone(self) -> BinaryIO:
        """Two that write one file at once would leave a file of neither."""
        path = self._partial(".bin")
        while True:
            file = path.open("ab")
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):  # else the other has just given it its name
                    file.truncate(0)
                    return file
            file.close()

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document of token ids [n].

        Raises:
            ValueError: an id does not fit the dtype.
            UserError: the document is longer than the format allows.
        """
        ids = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if ids.size and (ids.min() < limits.min or ids.max() > limits.max):
            raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit {self.dtype}")
        if ids.size > MAX_SEQUENCE_LENGTH:
            raise UserError(
                f"{self.prefix}: document {self.num_documents} has {ids.size:,} tokens, more than the format's "
                f"{MAX_SEQUENCE_LENGTH:,}; split it"
            )
        self._write_tokens(ids)
        self._lengths.write(struct.pack("<i", ids.size))
        self.num_documents += 1

    def add_file(self, file: IndexedFile) -> None:
        """Append all documents of a file of the same dtype.

        Raises:
            ValueError: it has another dtype.
            UserError: it cannot be read any more.
        """
        if file.dtype != self.dtype:
            raise ValueError(f"documents of {file.dtype} cannot be appended to those of {self.dtype}")
        for start in range(0, file.num_tokens, CHUNK):
            self._write_tokens(file.tokens(start, min(start + CHUNK, file.num_tokens)))
        for start in range(0, file.num_documents, CHUNK):
            lengths = file.document_lengths(start, min(start + CHUNK, file.num_documents))
            self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_documents += file.num_documents

    def _write_tokens(self, ids: np.ndarray) -> None:
        data = ids.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
        self._bin.write(data)
        self.bin_hash.update(data)
        self.num_tokens += ids.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        committed = False
        try:
            if kind is None:
                self._commit()
                committed = True
        finally:
            if not committed:  # else what has these names now is another's
                for suffix in (".idx", ".bin"):
                    self._partial(suffix).unlink(missing_ok=True)
            self._lengths.close()
            self._bin.close()

    def _partial(self, suffix: str) -> Path:
        return _with_suffix(self.prefix, f"{suffix}.partial")

    def _commit(self) -> None:
        if not self.num_tokens:
            raise UserError(f"{self.prefix}: no tokens to write")
        _sync(self._bin)
        with self._partial(".idx").open("wb") as index:
            for data in self._index():
                index.write(data)
                self.idx_hash.update(data)
            _sync(index)
        bin_path, idx_path, manifest_path = corpus_files(self.prefix)
        # A new .bin must never stand beside an old .idx or manifest.
        manifest_path.unlink(missing_ok=True)
        idx_path.unlink(missing_ok=True)
        self._partial(".bin").replace(bin_path)
        self._partial(".idx").replace(idx_path)

    def _index(self) -> Iterator[bytes]:
        """The .idx, in pieces."""
        code = next(code for code, name in DTYPE_CODES.items() if name == self.dtype.name)
        yield HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1)
        self._lengths.seek(0)
        while chunk := self._lengths.read(CHUNK * 4):
            yield chunk
        self._lengths.seek(0)
        start = 0
        while chunk := self._lengths.read(CHUNK * 4):
            lengths = np.frombuffer(chunk, "<i4").astype("<i8")
            ends = start + np.cumsum(lengths)
            yield ((ends - lengths) * self.dtype.itemsize).tobytes()
            start = int(ends[-1])
        for first in range(0, self.num_documents + 1, CHUNK):
            yield np.arange(first, min(first + CHUNK, self.num_documents + 1), dtype="<i8").tobytes()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Corpus:
    """A corpus on disk or in a remote storage: one stream of tokens, cut into documents.

    `prefix` may be a pattern with `*`, `?` or `[…]`: the files that fit it, in the order of their names, are then one
    stream. Opening reads a few pages at any size. Local files stay open, so that a corpus that is removed under a run
    goes on being read.
    """

    def __init__(self, prefix: str | Path) -> None:
        """
        Raises:
            UserError: a file is missing, truncated, of another format, or the two do not belong together.
        """
        self.prefix = str(prefix)
        self.remote = is_remote(self.prefix)
        opened = self._at_once(lambda path: (file := IndexedFile(path), _manifest(file)), _prefixes(self.prefix))
        self._files = [file for file, _ in opened]
        self.manifests = {file.prefix: manifest for file, manifest in opened if manifest is not None}
        """Those that there are, by the prefix of their file."""
        self._token_ends = list(accumulate(file.num_tokens for file in self._files))
        self._document_ends = list(accumulate(file.num_documents for file in self._files))
        self.num_tokens, self.num_documents = self._token_ends[-1], self._document_ends[-1]
        self.dtype = np.result_type(*(file.dtype for file in self._files))

    @property
    def files(self) -> dict[str, tuple[int, int]]:
        """The files that it consists of, in order: prefix → (tokens, documents)."""
        return {file.prefix: (file.num_tokens, file.num_documents) for file in self._files}

    @property
    def manifest(self) -> Manifest | None:
        """PREFIX.json, of several files the sum of theirs; None if one has none.

        Raises:
            UserError: one was made with another tokenizer than the others.
        """
        found = list(self.manifests.values())
        for prefix, manifest in self.manifests.items():
            if manifest.made_with != found[0].made_with:
                raise UserError(
                    f"{prefix}: was not tokenized like {next(iter(self.manifests))}, which {self.prefix} takes for a "
                    "part of the same corpus; tokenize it again, or give two corpora"
                )
        if len(found) < len(self._files):
            return None
        sums = {key: sum(getattr(manifest, key) for manifest in found) for key in ("documents", "tokens", "text_bytes")}
        rejected = sum((Counter(manifest.rejected) for manifest in found), Counter[str]())
        one = found[0].checksums if len(found) == 1 else None
        return found[0].model_copy(update={**sums, "rejected": dict(rejected), "checksums": one})

    @cached_property
    def identity(self) -> "CorpusIdentity":
        """What tells this corpus from another one, at the price of a few reads; however it is cut into files.

        Raises:
            UserError: as `tokens`.
        """
        digest = hashlib.sha256()
        for tokens in self.sample:
            digest.update(tokens.astype("<i8").tobytes())
        digest.update(np.array([self.document_start(i) for i in self._spread_documents], "<i8").tobytes())
        return CorpusIdentity(tokens=self.num_tokens, documents=self.num_documents, sampled_sha256=digest.hexdigest())

    @cached_property
    def sample(self) -> list[np.ndarray]:
        """Some stretches of tokens, spread evenly over the stream; always the same ones.

        Raises:
            UserError: as `tokens`.
        """
        last = max(0, self.num_tokens - SAMPLED_LENGTH)
        starts = sorted({last * i // (SAMPLED_PLACES - 1) for i in range(SAMPLED_PLACES)})
        return self.read([(start, min(start + SAMPLED_LENGTH, self.num_tokens)) for start in starts])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, read-only. Safe to call from several threads.

        Raises:
            IndexError: the range does not lie in [0, num_tokens].
            UserError: a file was cut or became unreadable since it was opened.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a corpus of {self.num_tokens}")
        first = min(bisect_right(self._token_ends, start), len(self._files) - 1)
        parts, begins = [], self._token_ends[first] - self._files[first].num_tokens
        for file in self._files[first:]:
            parts.append(file.tokens(max(start - begins, 0), min(stop - begins, file.num_tokens)))
            begins += file.num_tokens
            if begins >= stop:
                break
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts)
        joined.flags.writeable = False
        return joined

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """`tokens` of each range; from a remote storage many at once.

        Raises:
            IndexError, UserError: as `tokens`.
        """
        return self._at_once(lambda ends: self.tokens(*ends), ranges)

    def _at_once(self, ask: Callable[[Question], Answer], questions: Sequence[Question]) -> list[Answer]:
        """`ask` of each; where the answers come from far, of many at a time."""
        if not self.remote:
            return [ask(question) for question in questions]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, questions))

    @property
    def _spread_documents(self) -> list[int]:
        last = self.num_documents - 1
        return sorted({last * i // (SAMPLED_PLACES - 1) for i in range(SAMPLED_PLACES)})

    @property
    def sampled_documents(self) -> list[int]:
        """Some documents, spread evenly, and the last one of each file."""
        return sorted({*self._spread_documents, *(end - 1 for end in self._document_ends if end)})

    def document_ends(self, documents: Sequence[int]) -> list[int | None]:
        """The last token of each document; None of an empty one.

        Raises:
            UserError: as `tokens`.
        """

        def end_of(i: int) -> int | None:
            start, end = self.document_start(i), self.document_start(i + 1)
            return int(self.tokens(end - 1, end)[0]) if end > start else None

        return self._at_once(end_of, documents)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, its EOS included, read-only.

        Raises:
            IndexError: i does not lie in [0, num_documents).
            UserError: as `tokens`.
        """
        return self.tokens(self.document_start(i), self.document_start(i + 1))

    def document_start(self, i: int) -> int:
        """Where document i begins in the stream, in tokens; the stream's end for i = num_documents.

        Raises:
            IndexError: i does not lie in [0, num_documents].
            UserError: as `tokens`, of the index.
        """
        if not 0 <= i <= self.num_documents:
            raise IndexError(f"document {i} of a corpus of {self.num_documents}")
        if i == self.num_documents:
            return self.num_tokens
        number = bisect_right(self._document_ends, i)
        file = self._files[number]
        within = i - (self._document_ends[number] - file.num_documents)
        return self._token_ends[number] - file.num_tokens + file.document_start(within)

    def document_at(self, token: int) -> int:
        """The document that token 0 … num_tokens − 1 of the stream belongs to; a binary search in the index.

        Raises:
            UserError: as `tokens`, of the index.
        """
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1


def _prefixes(prefix: str) -> list[str]:
    """The files that a prefix or pattern stands for."""
    if is_remote(prefix) and "?" in prefix:
        raise UserError(f"{prefix}: a URL with a query has no place for .bin and .idx; give one without")
    if not glob.has_magic(prefix) or exists(f"{prefix}.idx"):
        return [prefix]
    found = [path.removesuffix(".idx") for path in matches(prefix + ".idx")]
    if not found:
        raise UserError(f"{prefix}: no corpus: no file fits {prefix}.idx")
    return found


def _manifest(file: IndexedFile) -> Manifest | None:
    path = f"{file.prefix}.json"
    if not exists(path):
        return None
    stored = open_file(path)
    try:
        manifest = Manifest.model_validate_json(stored.read(0, stored.size))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "file"
        raise UserError(f"{path}: not a corpus manifest: {place}: {problem['msg']}; tokenize again") from None
    if (manifest.documents, manifest.tokens) != (file.num_documents, file.num_tokens):
        raise UserError(
            f"{path}: describes {manifest.documents:,} documents with {manifest.tokens:,} tokens, "
            f"but the corpus has {file.num_documents:,} with {file.num_tokens:,}; "
            "copy all three files, or tokenize again"
        )
    return manifest
