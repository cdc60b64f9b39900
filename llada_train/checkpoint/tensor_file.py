"""One rank's file: flat fp32 tensors in safetensors format, written from one buffer and read by range.

Nothing is mapped into memory, so a process holds what it asked for and no page of the file besides, and a file that
shrinks under a reader is an error and not a signal.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from llada_train.checkpoint.manifest import Count, DamagedError, FileEntry
from llada_train.config.errors import UserError

MAX_HEADER = 1 << 26  # a rank of an 8B run that owns all of it has 50 KiB
ITEM = 4  # bytes of an fp32
_CHUNK = 1 << 22  # bytes that are hashed, written or read at once, without holding up the interpreter


class _Entry(BaseModel):
    """A tensor in the header. data_offsets: bytes from the header's end."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["F32"]
    shape: tuple[Count]
    data_offsets: tuple[Count, Count]


_Header = TypeAdapter(dict[str, _Entry])


def write_tensors(path: Path, sizes: Mapping[str, int], data: Tensor) -> FileEntry:
    """Write tensors of so many elements that lie one after the other in `data` ([Σ sizes] fp32, on the CPU).

    Returns when they are on the disk and have been read back.

    Raises:
        OSError: they are not.
    """
    header = memoryview(_header(sizes))
    written = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (header, *_chunks(data)):
            written.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = file.tell()
    entry = FileEntry(size=size, sha256=written.hexdigest())
    if sha256(path) != entry.sha256:
        raise OSError(f"{path.name}: what was read back is not what was written")
    return entry


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Of a file's content; `on_bytes` gets how many bytes more have been read."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            on_bytes(count)
    return digest.hexdigest()


class TensorFile:
    """An open file of flat fp32 tensors."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        """Open it; it must hold tensors of just these names and numbers of elements.

        Raises:
            DamagedError: it does not.
            UserError: it cannot be opened.
        """
        self._path = path
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise DamagedError(path, "there is no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._starts = self._read_header(sizes)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read_into(self, out: Tensor, name: str, offset: int) -> None:
        """Fill the flat fp32 `out` with the elements of `name` from `offset` on."""
        content = _bytes(out)
        try:
            self._file.seek(self._starts[name] + offset * ITEM)
            count = self._file.readinto(content)
        except OSError as error:
            raise DamagedError(self._path, f"{name}: {error.strerror}") from None
        if count != len(content):
            raise DamagedError(self._path, f"{name} is cut short")

    def _read_header(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Where each tensor starts, in bytes from the file's start."""
        file_size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if length > min(MAX_HEADER, file_size - 8):
            raise DamagedError(self._path, f"a header of {length:,} bytes in a file of {file_size:,}")
        try:
            header = _Header.validate_json(self._file.read(length))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise DamagedError(self._path, f"header: {where}{first['msg']}") from None
        if {name: entry.shape[0] for name, entry in header.items()} != sizes:
            raise DamagedError(self._path, "its tensors are not those that the manifest lists")
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry.data_offsets):
            if entry.data_offsets != (end, end + entry.shape[0] * ITEM):
                raise DamagedError(self._path, "its tensors do not follow each other without gaps")
            end = entry.data_offsets[1]
        if 8 + length + end != file_size:
            raise DamagedError(self._path, f"{file_size:,} bytes, but its header tells of {8 + length + end:,}")
        return {name: 8 + length + entry.data_offsets[0] for name, entry in header.items()}


def _header(sizes: Mapping[str, int]) -> bytes:
    """The length of the JSON as 8 bytes, then the JSON, padded so that the data starts at a multiple of 8."""
    entries, start = {}, 0
    for name, elements in sizes.items():
        stop = start + elements * ITEM
        entries[name] = {"dtype": "F32", "shape": [elements], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(data: Tensor) -> Iterator[memoryview]:
    content = _bytes(data)
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]


def _bytes(flat: Tensor) -> memoryview:
    """The same memory as bytes."""
    assert flat.dtype == torch.float32 and flat.is_contiguous()
    return flat.numpy().view(np.uint8).data
