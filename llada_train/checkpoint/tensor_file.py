"""One rank's file: flat fp32 tensors in safetensors format, written from one buffer and read by range.

Nothing is mapped into memory, so a process holds what it asked for and no page of the file besides, and a file that
shrinks under a reader is an error and not a signal.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llada_train.checkpoint.header import header_bytes, read_header
from llada_train.checkpoint.manifest import DamagedError, FileEntry
from llada_train.config.errors import UserError

ITEM = 4  # bytes of an fp32
_CHUNK = 1 << 22  # bytes that are hashed, written or read at once, without holding up the interpreter


def write_tensors(path: Path, sizes: Mapping[str, int], data: Iterable[Tensor]) -> FileEntry:
    """Write tensors of so many elements, whose elements `data` gives one after the other (flat fp32, on the CPU).

    Returns when they are on the disk and have been read back.

    Raises:
        OSError: they are not.
    """
    header = memoryview(header_bytes({name: (elements,) for name, elements in sizes.items()}))
    written = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chain([header], _chunks(data)):
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
        try:
            header = read_header(self._file)
        except ValueError as error:
            raise DamagedError(self._path, str(error)) from None
        flat = {name: (elements,) for name, elements in sizes.items()}
        if {name: entry.shape for name, entry in header.items()} != flat:
            raise DamagedError(self._path, "its tensors are not those that the manifest lists")
        if foreign := next((name for name, entry in header.items() if entry.dtype != "F32"), None):
            raise DamagedError(self._path, f"header: {foreign}: dtype: not F32")
        return {name: entry.start for name, entry in header.items()}


def _chunks(data: Iterable[Tensor]) -> Iterator[memoryview]:
    for part in data:
        content = _bytes(part)
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK]


def _bytes(flat: Tensor) -> memoryview:
    """The same memory as bytes."""
    assert flat.dtype == torch.float32 and flat.is_contiguous()
    return flat.numpy().view(np.uint8).data
