"""A tokenized corpus on disk, in Megatron's indexed format: PREFIX.bin and PREFIX.idx, and PREFIX.json about them.

PREFIX.bin is all tokens of all documents, one after another. PREFIX.idx (little-endian) is the magic `MMIDIDX\\0\\0`,
version u64 = 1, dtype code u8, number of sequences n u64, number of document indices d u64, then lengths i32[n] in
tokens, pointers i64[n] in bytes into the .bin, and document indices i64[d]: document i is made of the sequences
[index[i], index[i + 1]), so that d is the number of documents + 1. We write one sequence per document and read any
number. PREFIX.json, the manifest, is ours; corpora made by Megatron's tools have none.
"""

import os
import shutil
import struct
import weakref
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from llada_train.config.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
MAX_SEQUENCE_LENGTH = 2**31 - 1  # lengths are int32
CHUNK = 1 << 20  # entries of the index that are in memory at once while writing


class Manifest(BaseModel):
    """What PREFIX.json says of a corpus: enough to check it against a tokenizer and to report bits per byte."""

    model_config = ConfigDict(frozen=True)

    documents: int
    tokens: int  # with the EOS after each document
    text_bytes: int  # of the documents, in UTF-8
    tokenizer_fingerprint: str
    dtype: str
    eos_id: int

    def save(self, prefix: Path) -> None:
        """Write PREFIX.json, beside and renamed."""
        path, partial = _with_suffix(prefix, ".json"), _with_suffix(prefix, ".json.partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


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
        if self.dtype.name not in DTYPE_CODES.values():
            raise ValueError(f"no integer dtype of Megatron's format: {self.dtype}")

    def __enter__(self) -> Self:
        """
        Raises:
            UserError: the folder cannot be made or written to.
        """
        folder = self.prefix.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._bin = self._partial(".bin").open("wb")
            self._lengths = TemporaryFile(dir=folder)
        except OSError as error:
            raise UserError(f"{self.prefix}: cannot be written: {error.strerror}") from None
        return self

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
        self._bin.write(ids.astype(self.dtype.newbyteorder("<")).tobytes())
        self._lengths.write(struct.pack("<i", ids.size))
        self.num_documents += 1
        self.num_tokens += ids.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._lengths.close()
            self._bin.close()
            for suffix in (".bin", ".idx"):
                self._partial(suffix).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return _with_suffix(self.prefix, f"{suffix}.partial")

    def _commit(self) -> None:
        if not self.num_tokens:
            raise UserError(f"{self.prefix}: no tokens to write")
        _sync(self._bin)
        with self._partial(".idx").open("wb") as index:
            self._write_index(index)
            _sync(index)
        bin_path, idx_path, manifest_path = corpus_files(self.prefix)
        # A new .bin must never stand beside an old .idx or manifest.
        manifest_path.unlink(missing_ok=True)
        idx_path.unlink(missing_ok=True)
        self._partial(".bin").replace(bin_path)
        self._partial(".idx").replace(idx_path)

    def _write_index(self, index: BinaryIO) -> None:
        code = next(code for code, name in DTYPE_CODES.items() if name == self.dtype.name)
        index.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, index)
        self._lengths.seek(0)
        start = 0
        while chunk := self._lengths.read(CHUNK * 4):
            lengths = np.frombuffer(chunk, "<i4").astype("<i8")
            ends = start + np.cumsum(lengths)
            index.write(((ends - lengths) * self.dtype.itemsize).tobytes())
            start = int(ends[-1])
        for first in range(0, self.num_documents + 1, CHUNK):
            index.write(np.arange(first, min(first + CHUNK, self.num_documents + 1), dtype="<i8").tobytes())


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Corpus:
    """A corpus on disk: one stream of tokens, cut into documents. Opening reads a few pages at any size.

    Both files stay open, so that a corpus that is removed under a run goes on being read. Nothing is memory-mapped: a
    file that is cut under a memory map ends the process by SIGBUS, without a word.
    """

    def __init__(self, prefix: Path) -> None:
        """
        Raises:
            UserError: a file is missing, truncated, of another format, or the two do not belong together.
        """
        self.prefix = prefix
        self._bin_path, self._idx_path, self._manifest_path = corpus_files(prefix)
        self._check_present()
        self._bin, self._idx = _File(self._bin_path), _File(self._idx_path)
        header = self._idx.read(0, min(HEADER.size, self._idx.size))
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self._idx_path}: not a Megatron index (.idx); make the corpus with `llada-data tokenize`"
            )
        if len(header) < HEADER.size:
            raise self._truncated(HEADER.size)
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != VERSION or code not in DTYPE_CODES:
            raise UserError(
                f"{self._idx_path}: version {version}, dtype code {code}; expected version {VERSION} and integer "
                f"tokens (codes {', '.join(map(str, DTYPE_CODES))})"
            )
        expected = HEADER.size + sequences * 12 + indices * 8
        if self._idx.size < expected:
            raise self._truncated(expected)
        if not sequences:
            raise UserError(f"{self._idx_path}: the corpus has no documents")

        self.dtype = np.dtype(DTYPE_CODES[code])
        self._num_sequences = sequences
        self.num_documents = indices - 1
        self._check_sizes()
        self.num_tokens = self._bin.size // self.dtype.itemsize

    @property
    def manifest(self) -> Manifest | None:
        """PREFIX.json; None if there is none.

        Raises:
            UserError: it is broken, or it describes another corpus.
        """
        if not self._manifest_path.is_file():
            return None
        try:
            manifest = Manifest.model_validate_json(self._manifest_path.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"])) or "file"
            raise UserError(
                f"{self._manifest_path}: not a corpus manifest: {place}: {problem['msg']}; tokenize again"
            ) from None
        if (manifest.documents, manifest.tokens) != (self.num_documents, self.num_tokens):
            raise UserError(
                f"{self._manifest_path}: describes {manifest.documents:,} documents with {manifest.tokens:,} tokens, "
                f"but the corpus has {self.num_documents:,} with {self.num_tokens:,}; "
                "copy all three files, or tokenize again"
            )
        return manifest

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, read-only. Safe to call from several threads.

        Raises:
            IndexError: the range does not lie in [0, num_tokens].
            UserError: the file was cut or became unreadable since it was opened.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a corpus of {self.num_tokens}")
        size = self.dtype.itemsize
        return np.frombuffer(self._bin.read(start * size, (stop - start) * size), self.dtype.newbyteorder("<"))

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
        sequence = self._document(i)
        return self.num_tokens if sequence == self._num_sequences else self._pointer(sequence) // self.dtype.itemsize

    def _length(self, sequence: int) -> int:
        """In tokens."""
        return self._entry("<i", 0, sequence)

    def _pointer(self, sequence: int) -> int:
        """Where the sequence begins in the .bin, in bytes."""
        return self._entry("<q", self._num_sequences * 4, sequence)

    def _document(self, i: int) -> int:
        """The first sequence of document i."""
        return self._entry("<q", self._num_sequences * 12, i)

    def _entry(self, kind: str, array: int, i: int) -> int:
        """Entry i of the index's array that begins `array` bytes after the header."""
        size = struct.calcsize(kind)
        (value,) = struct.unpack(kind, self._idx.read(HEADER.size + array + i * size, size))
        return int(value)

    def _check_present(self) -> None:
        missing = [path for path in (self._bin_path, self._idx_path) if not path.is_file()]
        if not missing:
            return
        names = " and ".join(map(str, missing))
        hint = "give the prefix that .bin and .idx are added to"
        if self.prefix.suffix in (".bin", ".idx") and self.prefix.is_file():
            hint = f"give the prefix, {self.prefix.with_suffix('')}"
        raise UserError(f"{self.prefix}: no corpus: {names} missing; {hint}, or make it with `llada-data tokenize`")

    def _check_sizes(self) -> None:
        """The first and last entries of the index against each other and the .bin."""
        n = self._num_sequences
        if self.num_documents < 0 or (self._document(0), self._document(self.num_documents)) != (0, n):
            raise UserError(f"{self._idx_path}: damaged: its documents do not cover its sequences; tokenize again")
        described = self._pointer(n - 1) + self._length(n - 1) * self.dtype.itemsize
        size = self._bin.size
        if size != described or not size:
            raise UserError(
                f"{self._bin_path}: has {size:,} bytes, but {self._idx_path} describes {described:,}; "
                "a file is truncated or the two are not of one corpus: copy both again, or tokenize again"
            )

    def _truncated(self, expected: int) -> UserError:
        return UserError(
            f"{self._idx_path}: truncated: {self._idx.size:,} of {expected:,} bytes; copy it again, or tokenize again"
        )


class _File:
    """An open file that is read at any place, by any thread; closed when it is no longer used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; mend its permissions") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size  # as it was when the run began

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), which lay in the file when it was opened.

        Raises:
            UserError: they are not there any more.
        """
        data = b""
        while len(data) < size:
            try:
                part = os.pread(self._descriptor, size - len(data), start + len(data))
            except OSError as error:
                raise self._lost(f"cannot be read any more: {error.strerror}") from None
            if not part:
                raise self._lost(f"has no byte {start + len(data):,} any more, of {self.size:,}: it was cut")
            data += part
        return data

    def _lost(self, what: str) -> UserError:
        return UserError(
            f"{self._path}: {what} since it was opened; put the file back as it was, and run the same command "
            "again: a run goes on from its newest checkpoint"
        )
