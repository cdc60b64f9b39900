"""What the cleaning commands write: documents as JSON lines, and a report beside them. Whole or not at all."""

import fcntl
import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from data_tools.sources import Sources
from llada_train.config.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def report_path(output: Path) -> Path:
    """Where the report on `output` lies."""
    return output.with_name(f"{output.name}.report.json")


def check_output(output: Path, sources: Sources, overwrite: bool) -> None:
    """
    Raises:
        UserError: the name has no known suffix, or as `check_place`.
    """
    if not output.name.endswith(SUFFIXES):
        raise UserError(f"{output}: --output has to end in {', '.join(SUFFIXES)}")
    check_place(output, "--output", sources, overwrite)


def check_place(path: Path, option: str, sources: Sources, overwrite: bool) -> None:
    """`option` is what names `path`.

    Raises:
        UserError: it lies in a folder that is read, or exists and may not be replaced.
    """
    sources.refuse_output(path)
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path}: already there; give another {option}, or --overwrite to replace it")
    if any(file.samefile(path) for file in sources.files):
        raise UserError(f"{path}: is part of the input; give another {option}")


@contextmanager
def document_writer(output: Path) -> Iterator[Callable[[str], None]]:
    """A function that appends a text as one JSON line under the key "text", compressed as the suffix says.

    The file appears when the block ends; an exception, or a kill, leaves what was there before.

    Raises:
        UserError: another run is writing the same file.
    """
    with whole_file(output) as raw:
        stream: BinaryIO = raw
        if output.suffix == ".gz":
            stream = cast(BinaryIO, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0))
        elif output.suffix == ".zst":
            stream = cast(BinaryIO, zstandard.ZstdCompressor().stream_writer(raw, closefd=False))

        def write(text: str) -> None:
            stream.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n")

        yield write
        if stream is not raw:
            stream.close()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends without an exception.

    Until then it has a hidden name, which no command takes for input, and which the next run uses again.

    Raises:
        UserError: the folder cannot be made or written to, or another run is writing the same file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.stat().st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # or the other run has just finished, and this is its output
            raise UserError(f"{path}: another run is writing it")
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
