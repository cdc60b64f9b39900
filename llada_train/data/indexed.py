"""Megatron's indexed format: PREFIX.bin, all tokens of all documents, and PREFIX.idx, which says where each lies.

PREFIX.idx (little-endian) is the magic `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, number of sequences n u64,
number of document indices d u64, then lengths i32[n] in tokens, pointers i64[n] in bytes into the .bin, and document
indices i64[d]: document i is made of the sequences [index[i], index[i + 1]), so that d is the number of documents + 1.
We write one sequence per document and read any number.
"""

import struct

import numpy as np

from llada_train.config.errors import UserError
from llada_train.data.storage import exists, open_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CHUNK = 1 << 20  # entries of the index that are in memory at once
MAX_SEQUENCE_LENGTH = 2**31 - 1  # lengths are int32


class IndexedFile:
    """One PREFIX.bin and PREFIX.idx, open."""

    def __init__(self, prefix: str) -> None:
        """
        Raises:
            UserError: a file is missing, truncated, of another format, or the two do not belong together.
        """
        self.prefix = prefix
        self._check_present()
        self._bin, self._idx = open_file(f"{prefix}.bin"), open_file(f"{prefix}.idx")
        header = self._idx.read(0, min(HEADER.size, self._idx.size))
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self._idx.path}: not a Megatron index (.idx); make the corpus with `llada-data tokenize`"
            )
        if len(header) < HEADER.size:
            raise self._truncated(HEADER.size)
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != VERSION or code not in DTYPE_CODES:
            raise UserError(
                f"{self._idx.path}: version {version}, dtype code {code}; expected version {VERSION} and integer "
                f"tokens (codes {', '.join(map(str, DTYPE_CODES))})"
            )
        expected = HEADER.size + sequences * 12 + indices * 8
        if self._idx.size < expected:
            raise self._truncated(expected)
        if not sequences:
            raise UserError(f"{self._idx.path}: the corpus has no documents")

        self.dtype = np.dtype(DTYPE_CODES[code])
        self._num_sequences = sequences
        self.num_documents = indices - 1
        self._check_sizes()
        self.num_tokens = self._bin.size // self.dtype.itemsize

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), 0 ≤ start ≤ stop ≤ num_tokens, read-only. Safe to call from several threads.

        Raises:
            UserError: the file was cut or became unreadable since it was opened.
        """
        size = self.dtype.itemsize
        return np.frombuffer(self._bin.read(start * size, (stop - start) * size), self.dtype.newbyteorder("<"))

    def document_start(self, i: int) -> int:
        """Where document i < num_documents begins, in tokens.

        Raises:
            UserError: as `tokens`, of the index.
        """
        sequence = self._document(i)
        return self.num_tokens if sequence == self._num_sequences else self._pointer(sequence) // self.dtype.itemsize

    def document_lengths(self, start: int, stop: int) -> np.ndarray:
        """The lengths in tokens, int64[stop - start], of documents [start, stop), 0 ≤ start ≤ stop ≤ num_documents.

        Raises:
            UserError: as `tokens`, of the index.
        """
        offset = HEADER.size + self._num_sequences * 12 + start * 8
        sequences = np.frombuffer(self._idx.read(offset, (stop + 1 - start) * 8), "<i8")
        first, last = int(sequences[0]), int(sequences[-1])
        lengths = np.frombuffer(self._idx.read(HEADER.size + first * 4, (last - first) * 4), "<i4")
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.diff(ends[sequences - first])

    def damage(self) -> str | None:
        """What is wrong inside the index, which opening does not look at; None if nothing is.

        Raises:
            UserError: as `tokens`, of the index.
        """
        position, n = 0, self._num_sequences
        for start in range(0, n, CHUNK):
            count = min(CHUNK, n - start)
            lengths = np.frombuffer(self._idx.read(HEADER.size + start * 4, count * 4), "<i4").astype(np.int64)
            pointers = np.frombuffer(self._idx.read(HEADER.size + n * 4 + start * 8, count * 8), "<i8")
            ends = position + np.cumsum(lengths)
            if (lengths < 0).any() or (pointers != (ends - lengths) * self.dtype.itemsize).any():
                return f"{self._idx.path}: damaged: its sequences do not lie one after another; tokenize again"
            position = int(ends[-1])
        if position != self.num_tokens:
            return f"{self._idx.path}: damaged: it describes {position:,} tokens of {self.num_tokens:,}; tokenize again"
        for start in range(0, self.num_documents, CHUNK):
            count = min(CHUNK, self.num_documents - start) + 1
            firsts = np.frombuffer(self._idx.read(HEADER.size + n * 12 + start * 8, count * 8), "<i8")
            if (np.diff(firsts) < 0).any():
                return f"{self._idx.path}: damaged: its documents are not in order; tokenize again"
        return None

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
        missing = [path for path in (f"{self.prefix}.bin", f"{self.prefix}.idx") if not exists(path)]
        if not missing:
            return
        hint = "give the prefix that .bin and .idx are added to"
        without, dot, suffix = self.prefix.rpartition(".")
        if f"{dot}{suffix}" in (".bin", ".idx") and exists(self.prefix):
            hint = f"give the prefix, {without}"
        raise UserError(
            f"{self.prefix}: no corpus: {' and '.join(missing)} missing; {hint}, or make it with `llada-data tokenize`"
        )

    def _check_sizes(self) -> None:
        """The first and last entries of the index against each other and the .bin."""
        n = self._num_sequences
        if self.num_documents < 0 or (self._document(0), self._document(self.num_documents)) != (0, n):
            raise UserError(f"{self._idx.path}: damaged: its documents do not cover its sequences; tokenize again")
        described = self._pointer(n - 1) + self._length(n - 1) * self.dtype.itemsize
        size = self._bin.size
        if size != described or not size:
            raise UserError(
                f"{self._bin.path}: has {size:,} bytes, but {self._idx.path} describes {described:,}; "
                "a file is truncated or the two are not of one corpus: copy both again, or tokenize again"
            )

    def _truncated(self, expected: int) -> UserError:
        return UserError(
            f"{self._idx.path}: truncated: {self._idx.size:,} of {expected:,} bytes; copy it again, or tokenize again"
        )
