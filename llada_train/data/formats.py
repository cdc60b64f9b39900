"""The records of one input file, whatever its format: numbered texts or objects, and what could not be read.

| name ends in | records |
|---|---|
| .jsonl or .ndjson, also with .gz or .zst after it | one JSON object per line, the text under a key |
| .json.gz, .json.zst | the same: so are C4 and others called |
| .parquet, .arrow | rows, the text in a column |
| anything else, also with .gz or .zst after it | the whole file |
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

if TYPE_CHECKING:
    import pyarrow

LINES = (".jsonl", ".ndjson")
DOCUMENT_LIMIT = 64 << 20  # bytes: what one document may have, so that memory stays bounded
TOO_LONG = f"longer than {DOCUMENT_LIMIT >> 20} MiB"
READ = 1 << 20  # bytes of a file at once
ZSTD_READ = 1 << 10  # of a .zst file: a few bytes may stand for 128 KiB, so that this makes tens of MB at most
ROWS = 64  # of a .parquet file at once


@dataclass(frozen=True)
class Rejection:
    """A record, or the rest of a file, that cannot be used."""

    reason: str


Record = tuple[int, str | Rejection]  # the number of the line or row, from 1
Object = tuple[int, dict[str, Any] | Rejection]
Found = TypeVar("Found")
Advance = Callable[[int], None]  # so many bytes of the file are done


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read by itself: lines that begin in bytes [start, stop), or row groups [start, stop)."""

    file: Path
    size: int  # about how many bytes of the file it is
    start: int = 0
    stop: int | None = None  # to the end

    def place(self, number: int) -> str:
        """Where record `number` of this piece is, for people."""
        kind = _kind(self.file)
        if kind == "whole":
            return str(self.file)
        noun = "line" if kind == "lines" else "row"
        if not self.start:
            return f"{self.file}, {noun} {number}"
        origin = f"byte {self.start:,}" if kind == "lines" else f"row group {self.start}"
        return f"{self.file}, {noun} {number} from {origin} on"


def split(file: Path, size: int, piece_size: int) -> list[Piece]:
    """Pieces of about `piece_size` bytes that together are the file; one, if it can only be read from its start."""
    if size > piece_size:
        if file.suffix in LINES:
            return [
                Piece(file, min(piece_size, size - start), start, min(start + piece_size, size))
                for start in range(0, size, piece_size)
            ]
        if file.suffix == ".parquet":
            return _row_groups(file, size, piece_size)
    return [Piece(file, size)]


def read(piece: Piece, text_key: str, advance: Advance) -> Iterator[Record]:
    """The records of a piece, in order. Damage ends it with a `Rejection`, never with an exception."""
    kind = _kind(piece.file)
    if kind == "whole":
        return _whole(piece, advance)
    if kind == "lines":
        return _lines(piece, partial(_text_of, text_key), advance)
    column = partial(_column, text_key)
    return _parquet(piece, [text_key], column, advance) if kind == "parquet" else _arrow(piece, column, advance)


def read_objects(file: Path, advance: Advance) -> Iterator[Object]:
    """The records of a file with all their keys, in order: JSON lines, rows, or the items of one JSON list (.json).

    Damage ends it with a `Rejection`, never with an exception.
    """
    piece = Piece(file, file.stat().st_size)
    kind = _kind(file)
    if kind == "whole":
        return _items(piece, advance)
    if kind == "lines":
        return _lines(piece, _object, advance)
    return _parquet(piece, None, _rows, advance) if kind == "parquet" else _arrow(piece, _rows, advance)


def decode(data: bytes) -> str | Rejection:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return Rejection("not valid UTF-8")


def _kind(file: Path) -> str:
    if file.suffix in LINES or (_is_compressed(file) and Path(file.stem).suffix in (*LINES, ".json")):
        return "lines"
    return {".parquet": "parquet", ".arrow": "arrow"}.get(file.suffix, "whole")


def _is_compressed(file: Path) -> bool:
    return file.suffix in (".gz", ".zst")


class _Source:
    """An open file, decompressed. A context manager; `advance` is told what of the file itself has been read."""

    def __init__(self, file: Path, advance: Advance) -> None:
        self._raw = file.open("rb", buffering=READ)
        self._advance = advance
        self._told = 0
        self.stream: BinaryIO = self._raw
        if file.suffix == ".gz":
            self.stream = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw))
        elif file.suffix == ".zst":
            self.stream = cast(BinaryIO, io.BufferedReader(_ZstdFile(self._raw), READ))

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def report(self) -> None:
        done = self._raw.tell()
        self._advance(done - self._told)
        self._told = done


class _ZstdFile(io.RawIOBase):
    """The frames of a .zst file. The library's own reader takes a file that is cut for one that ends."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: object = None
        self._rest = b""  # read, not yet decompressed
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        while not self._out:
            data = self._rest or self._raw.read(ZSTD_READ)
            if not data:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._out = memoryview(self._decompress(data))
        size = min(len(view), len(self._out))
        view[:size] = self._out[:size]
        self._out = self._out[size:]
        return size

    def _decompress(self, data: bytes) -> bytes:
        import zstandard

        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        frame = cast("zstandard.ZstdDecompressionObj", self._frame)
        try:
            out = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise zlib.error(str(error)) from None
        self._rest = frame.unused_data if frame.eof else b""
        if frame.eof:
            self._frame = None
        return out


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)
_DAMAGED = Rejection("damaged or truncated archive, from there on")
_UNREADABLE = Rejection("unreadable")
_NO_OBJECT = Rejection("not a JSON object")


def _whole(piece: Piece, advance: Advance) -> Iterator[Record]:
    try:
        with _Source(piece.file, advance) as source:
            data = source.stream.read(DOCUMENT_LIMIT + 1)
    except _DAMAGE:
        yield 1, _DAMAGED
    except OSError:
        yield 1, _UNREADABLE
    else:
        yield 1, Rejection(TOO_LONG) if len(data) > DOCUMENT_LIMIT else decode(data)
    advance(piece.size)


def _items(piece: Piece, advance: Advance) -> Iterator[Object]:
    """Of a file that is one list of JSON objects."""
    for _, text in _whole(piece, advance):
        try:
            found = text if isinstance(text, Rejection) else json.loads(text)
        except (ValueError, RecursionError):
            found = Rejection("broken JSON")
        items = found if isinstance(found, list) else [found]
        for number, item in enumerate(items, start=1):
            yield number, item if isinstance(item, dict | Rejection) else _NO_OBJECT


def _lines(
    piece: Piece, parse: Callable[[str], Found | Rejection], advance: Advance
) -> Iterator[tuple[int, Found | Rejection]]:
    number = 0
    try:
        with _Source(piece.file, advance) as source:
            stream = source.stream
            position = piece.start
            if piece.start:  # the line that begins before belongs to the piece before
                stream.seek(piece.start - 1)
                position += _skip_line(stream, piece.size) - 1
            while piece.stop is None or position < piece.stop:
                number += 1
                line = stream.readline(DOCUMENT_LIMIT + 1)
                if not line:
                    break
                position += len(line)
                too_long = len(line) > DOCUMENT_LIMIT
                if too_long and not line.endswith(b"\n"):
                    position += _skip_line(stream, None if piece.stop is None else piece.stop - position)
                if too_long:
                    yield number, Rejection(TOO_LONG)
                elif not line.isspace():
                    content = decode(line)
                    yield number, content if isinstance(content, Rejection) else parse(content)
    except _DAMAGE:
        yield number, _DAMAGED
    except OSError:
        yield number, _UNREADABLE
    advance(piece.size)


def _skip_line(stream: BinaryIO, enough: int | None) -> int:
    """Read on past the next newline, or past `enough` bytes, what is behind them being another's; how many that was."""
    size = 0
    while (enough is None or size <= enough) and (part := stream.readline(READ)):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _object(line: str) -> dict[str, Any] | Rejection:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Rejection("broken JSON")
    return record if isinstance(record, dict) else _NO_OBJECT


def _text_of(text_key: str, line: str) -> str | Rejection:
    record = _object(line)
    if record is _NO_OBJECT:
        return _no_text(text_key)
    value = record if isinstance(record, Rejection) else record.get(text_key)
    return value if isinstance(value, str | Rejection) else _no_text(text_key)


def _no_text(text_key: str) -> Rejection:
    return Rejection(f"no text under the key {text_key!r}")


def _row_groups(file: Path, size: int, piece_size: int) -> list[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            groups = parquet.num_row_groups
    except (OSError, pyarrow.ArrowException):
        return [Piece(file, size)]  # reading it will say what is wrong
    pieces = max(1, min(groups, -(-size // piece_size)))
    bounds = [groups * i // pieces for i in range(pieces + 1)]
    return [Piece(file, size // pieces, bounds[i], bounds[i + 1]) for i in range(pieces)]


Convert = Callable[["pyarrow.RecordBatch"], Iterator[Found | Rejection]]


def _parquet(
    piece: Piece, columns: list[str] | None, convert: "Convert[Found]", advance: Advance
) -> Iterator[tuple[int, Found | Rejection]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Without pre_buffer a column is read page by page, not row group by row group.
        with pyarrow.parquet.ParquetFile(piece.file, pre_buffer=False, buffer_size=READ) as parquet:
            missing = [name for name in columns or () if name not in parquet.schema_arrow.names]
            if missing:
                yield 1, _no_text(missing[0])
                advance(piece.size)
                return
            groups = range(piece.start, parquet.num_row_groups if piece.stop is None else piece.stop)
            for batch in parquet.iter_batches(ROWS, row_groups=groups, columns=columns):
                for found in convert(batch):
                    number += 1
                    yield number, found
    except pyarrow.ArrowException:
        yield number + 1, Rejection("damaged .parquet file, from there on")
    except OSError:
        yield number + 1, Rejection("damaged or unreadable .parquet file, from there on")
    advance(piece.size)


def _arrow(piece: Piece, convert: "Convert[Found]", advance: Advance) -> Iterator[tuple[int, Found | Rejection]]:
    import pyarrow

    number = 0
    try:
        with closing(pyarrow.OSFile(str(piece.file))) as file:  # a memory map of a file that is cut ends the process
            for batch in _arrow_batches(file):
                for found in convert(batch):
                    number += 1
                    yield number, found
    except pyarrow.ArrowException:
        yield number + 1, Rejection("damaged .arrow file, from there on")
    except OSError:
        yield number + 1, Rejection("damaged or unreadable .arrow file, from there on")
    advance(piece.size)


def _arrow_batches(file: "pyarrow.NativeFile") -> Iterator["pyarrow.RecordBatch"]:
    """Of both kinds of file: `datasets` writes streams."""
    import pyarrow

    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)


def _rows(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, Any] | Rejection]:
    batch.validate(full=True)  # reading offsets that are damaged can end the process; it looks at UTF-8 as well
    yield from batch.to_pylist()


def _column(text_key: str, batch: "pyarrow.RecordBatch") -> Iterator[str | Rejection]:
    import pyarrow

    # As bytes, since files can hold what is not UTF-8.
    as_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    values: list[bytes | None] = [None] * batch.num_rows
    if text_key in batch.schema.names:
        column = batch.column(text_key)
        if pyarrow.types.is_dictionary(column.type):
            column.validate(full=True)
            column = column.dictionary_decode()
        if column.type in as_bytes:
            column = column.view(as_bytes[column.type])
            column.validate(full=True)  # reading offsets that are damaged can end the process
            values = column.to_pylist()
    for value in values:
        if value is None:
            yield _no_text(text_key)
        else:
            yield Rejection(TOO_LONG) if len(value) > DOCUMENT_LIMIT else decode(value)
