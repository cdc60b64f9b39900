"""Writes corpora in Megatron's format (llada_train.data.indexed)."""

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from llada_train.config.errors import UserError
from llada_train.data.corpus import corpus_files
from llada_train.data.indexed import CHUNK, DTYPE_CODES, HEADER, MAGIC, MAX_SEQUENCE_LENGTH, VERSION, IndexedFile


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron uses for `vocab_size` ids: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


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

    def add_file(self, file: IndexedFile) -> str:
        """Append all documents of a file of the same dtype; the sha256 of its .bin, as it was read, in hexadecimal.

        Raises:
            ValueError: it has another dtype.
            UserError: it cannot be read any more.
        """
        if file.dtype != self.dtype:
            raise ValueError(f"documents of {file.dtype} cannot be appended to those of {self.dtype}")
        digest = hashlib.sha256()
        for start in range(0, file.num_tokens, CHUNK):
            digest.update(self._write_tokens(file.tokens(start, min(start + CHUNK, file.num_tokens))))
        for start in range(0, file.num_documents, CHUNK):
            lengths = file.document_lengths(start, min(start + CHUNK, file.num_documents))
            self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_documents += file.num_documents
        return digest.hexdigest()

    def _write_tokens(self, ids: np.ndarray) -> bytes:
        """The bytes that they are in the .bin."""
        data = ids.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
        self._bin.write(data)
        self.bin_hash.update(data)
        self.num_tokens += ids.size
        return data

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
        return self.prefix.parent / f"{self.prefix.name}{suffix}.partial"

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
