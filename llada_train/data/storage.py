"""Files that are read at any place, by any thread: on a file system, or wherever fsspec reaches (s3://, gs://, http://).

Nothing is memory-mapped: a file that is cut under a memory map ends the process by SIGBUS, without a word.
"""

import errno
import fnmatch
import glob
import os
import random
import resource
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llada_train.config.errors import UserError

ATTEMPTS = 6  # of a remote read; the waits between them add up to half a minute

Result = TypeVar("Result")


class File(Protocol):
    path: str
    size: int  # as it was when it was opened

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), which lay in the file when it was opened.

        Raises:
            UserError: they are not there any more, or cannot be read.
        """


def is_remote(path: str) -> bool:
    """Is it a URL, and not a path?"""
    return "://" in path


def exists(path: str) -> bool:
    """
    Raises:
        UserError: the storage cannot be asked.
    """
    if not is_remote(path):
        return Path(path).is_file()
    system, inner = _file_system(path)
    try:
        # Not its `isfile`, to which any fault means no.
        return bool(_patiently(path, lambda: system.info(inner))["type"] == "file")
    except _NotThereError:
        return False


def matches(pattern: str) -> list[str]:
    """The paths that fit a pattern with `*`, `?` or `[…]` (of one level each), sorted; no hidden ones.

    Raises:
        UserError: the storage cannot be asked.
    """
    if is_remote(pattern):
        system, inner = _file_system(pattern)
        return sorted(system.unstrip_protocol(path) for path in _patiently(pattern, lambda: system.glob(inner)))
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    found = [Path(*parts[:first])]
    for part in parts[first:]:
        found = [path for folder in found if folder.is_dir() for path in _entries(folder, part)]
    return sorted(map(str, found))


def _entries(folder: Path, pattern: str) -> list[Path]:
    """Unlike glob's, not a shorter list where the folder cannot be read."""
    try:
        names = fnmatch.filter((path.name for path in folder.iterdir()), pattern)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; mend its permissions") from None
    return [folder / name for name in names if not name.startswith(".")]


def open_file(path: str) -> File:
    """
    Raises:
        UserError: it does not exist, or cannot be read.
    """
    return _RemoteFile(path) if is_remote(path) else _LocalFile(path)


class _LocalFile:
    """Stays open, so that a file that is removed under a run goes on being read; closed when it is no longer used."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = _open(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; mend its permissions") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = os.pread(self._descriptor, size - len(data), start + len(data))
            except OSError as error:
                raise _lost(self.path, f"cannot be read any more: {error.strerror}") from None
            if not part:
                raise _lost(self.path, f"has no byte {start + len(data):,} any more, of {self.size:,}: it was cut")
            data += part
        return data


def _open(path: str) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a corpus may be of thousands of files
        return os.open(path, flags)


class _RemoteFile:
    """An object that is read by range. What fails is tried again, since one lost packet must not end a long run."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._system, self._inner = _file_system(path)
        size = _patiently(path, lambda: self._system.info(self._inner)["size"])
        if size is None:
            raise UserError(f"{path}: its server does not tell its size; use one that does, or copy the file")
        self.size = int(size)

    def read(self, start: int, size: int) -> bytes:
        if not size:
            return b""
        data: bytes = _patiently(self.path, lambda: self._system.cat_file(self._inner, start=start, end=start + size))
        if len(data) < size:
            raise _lost(self.path, f"has no byte {start + len(data):,} any more, of {self.size:,}: it was cut")
        if len(data) > size:
            raise UserError(f"{self.path}: its server ignores what range is asked for; use one that does not")
        return data


def _file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    import fsspec

    protocol = path.partition("://")[0]
    try:
        system, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {protocol}:// cannot be read here: {error}") from None
    return system, inner


class _NotThereError(UserError):
    """There is no such object."""


def _patiently(path: str, ask: Callable[[], Result]) -> Result:
    """What `ask` returns; a fault that may pass is waited for, longer each time, and not by all ranks alike."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except FileNotFoundError as error:
            raise _NotThereError(f"{path}: cannot be read: {error}; mend the path") from None
        except Exception as error:  # each storage has exceptions of its own
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise UserError(f"{path}: cannot be read: {error}; mend the permissions or the credentials") from None
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{path}: cannot be read, after {ATTEMPTS} attempts: {type(error).__name__}: {error}; run the same "
                    "command again when the storage answers"
                ) from None
            time.sleep(2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError


def _lost(path: str, what: str) -> UserError:
    return UserError(
        f"{path}: {what} since it was opened; put the file back as it was, and run the same command again: a run goes "
        "on from its newest checkpoint"
    )
