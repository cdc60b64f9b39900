"""Text documents from files and folders, and a count of what had to be left out."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llada_train.config.errors import UserError


class _RejectedError(Exception):
    """A document that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Document:
    text: str
    text_bytes: int  # in UTF-8


class Sources:
    """The documents of files and folders, always in the same order.

    A `.jsonl` file holds one document per line, under `text_key`; any other file is one document. Folders are read with
    all folders in them, sorted by name; names that begin with a dot and links to folders are passed over.

    Iterating again begins again. Meanwhile `bytes_read` and `rejected` tell how far it is and what was left out.
    """

    def __init__(self, inputs: Sequence[Path], text_key: str = "text") -> None:
        """
        Raises:
            UserError: an input does not exist.
        """
        missing = [str(path) for path in inputs if not path.exists()]
        if missing:
            raise UserError(f"no such file or folder: {', '.join(missing)}")
        self.text_key = text_key
        self.files = [file for path in inputs for file in ([path] if path.is_file() else _files(path))]
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        self.bytes_read = 0
        self.rejected: Counter[str] = Counter()
        """Reason → number of documents."""
        self.first_rejected: dict[str, str] = {}
        """Reason → where it was first met."""

    def __iter__(self) -> Iterator[Document]:
        self.bytes_read = 0
        self.rejected.clear()
        self.first_rejected.clear()
        for file in self.files:
            if file.suffix == ".jsonl":
                yield from self._lines(file)
            else:
                yield from self._whole(file)

    def _whole(self, file: Path) -> Iterator[Document]:
        try:
            data = file.read_bytes()
        except OSError:
            self._reject("unreadable", str(file))
            return
        self.bytes_read += len(data)
        try:
            document = _document(_decode(data))
        except _RejectedError as reason:
            self._reject(str(reason), str(file))
        else:
            yield document

    def _lines(self, file: Path) -> Iterator[Document]:
        try:
            stream = file.open("rb")
        except OSError:
            self._reject("unreadable", str(file))
            return
        with stream:
            for number, line in enumerate(stream, start=1):
                self.bytes_read += len(line)
                if line.isspace():
                    continue
                try:
                    document = self._parse(line)
                except _RejectedError as reason:
                    self._reject(str(reason), f"{file}, line {number}")
                else:
                    yield document

    def _parse(self, line: bytes) -> Document:
        try:
            record = json.loads(_decode(line))
        except (ValueError, RecursionError):
            raise _RejectedError("broken JSON") from None
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise _RejectedError(f"no text under the key {self.text_key!r}")
        return _document(text)

    def _reject(self, reason: str, place: str) -> None:
        self.rejected[reason] += 1
        self.first_rejected.setdefault(reason, place)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _files(path)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _RejectedError("not valid UTF-8") from None


def _document(text: str) -> Document:
    if not text.strip():
        raise _RejectedError("empty")
    if "\0" in text:
        raise _RejectedError("binary (has NUL characters)")
    try:
        return Document(text, len(text.encode("utf-8")))
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise _RejectedError("not valid UTF-8") from None
