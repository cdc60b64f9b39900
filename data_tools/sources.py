"""Text documents from files and folders, and a count of what had to be left out."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llada_train.config.errors import UserError
from llada_train.data.formats import DOCUMENT_LIMIT, TOO_LONG, Advance, Piece, Rejection, read, split

# What `datasets` writes beside the .arrow files of a folder.
DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
TWICE = "given or linked to more than once"
SMALLEST_UNIT, LARGEST_UNIT = 4 << 20, 256 << 20  # bytes of input that are one piece of work


@dataclass(frozen=True)
class Document:
    text: str
    text_bytes: int  # in UTF-8


@dataclass
class Tally:
    """What was left out: reason → number of documents, and where it was first met."""

    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str, count: int = 1) -> None:
        self.rejected[reason] += count
        self.first.setdefault(reason, place)

    def include(self, later: "Tally") -> None:
        for reason, count in later.rejected.items():
            self.add(reason, later.first[reason], count)


def read_documents(piece: Piece, text_key: str, tally: Tally, advance: Advance) -> Iterator[Document]:
    """The documents of a piece of a file; `tally` is told what is left out, `advance` how many bytes are done."""
    for number, text in read(piece, text_key, advance):
        document = text if isinstance(text, Rejection) else _document(text)
        if isinstance(document, Rejection):
            tally.add(document.reason, piece.place(number))
        else:
            yield document


class Sources:
    """The documents of files and folders, always in the same order.

    `llada_train.data.formats` says which files hold one document and which many. A name with `*`, `?` or `[…]` that no
    file has is a pattern (`**` for any folders). Folders are read with all folders in them, sorted by name, those that
    links lead to included; names that begin with a dot are passed over. In a folder that `datasets` wrote, its
    .arrow files are read in its own order. A file that is reached in several ways is read once.

    Iterating again begins again. Meanwhile `bytes_read` and `rejected` tell how far it is and what was left out.
    """

    def __init__(self, inputs: Sequence[Path], text_key: str = "text") -> None:
        """
        Raises:
            UserError: an input does not exist.
        """
        self.text_key = text_key
        self._walk_tally = Tally()
        self._inputs = _expand(inputs)
        self.files: list[Path] = []
        self.stats: list[os.stat_result] = []
        seen: set[tuple[int, int]] = set()
        folders: set[tuple[int, int]] = set()
        for path in self._inputs:
            for file in _files(path, folders, self._walk_tally):
                stat = file.stat()
                if (stat.st_dev, stat.st_ino) in seen:
                    self._walk_tally.add(TWICE, str(file))
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                self.files.append(file)
                self.stats.append(stat)
        self.total_bytes = sum(stat.st_size for stat in self.stats)
        self.bytes_read = 0
        self.tally = Tally()

    @property
    def rejected(self) -> Counter[str]:
        """Reason → number of documents."""
        return self.tally.rejected

    @property
    def first_rejected(self) -> dict[str, str]:
        """Reason → where it was first met."""
        return self.tally.first

    def refuse_output(self, path: Path) -> None:
        """
        Raises:
            UserError: `path` lies in a folder that is read, so that the next run would take it for text.
        """
        for folder in self._inputs:
            if folder.is_dir() and path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{path}: lies in {folder}, which is read; give a place outside of it")

    def refuse_changed(self) -> None:
        """
        Raises:
            UserError: a file is not as it was when it was found.
        """
        for file, before in zip(self.files, self.stats, strict=True):
            try:
                now = file.stat()
            except OSError:
                continue  # was counted as unreadable, or had been read
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise UserError(f"{file}: changed while it was read; run the command again")

    def begin(self) -> None:
        """Forget what reading met; what walking through the folders met stays."""
        self.bytes_read = 0
        self.tally = Tally()
        self.tally.include(self._walk_tally)

    def __iter__(self) -> Iterator[Document]:
        self.begin()
        for file, stat in zip(self.files, self.stats, strict=True):
            yield from read_documents(Piece(file, stat.st_size), self.text_key, self.tally, self._advance)

    def units(self) -> list[list[Piece]]:
        """All pieces of all files, in order, in groups of about the same number of bytes.

        They depend on the files alone. Large inputs make larger groups, so that they are some thousands at most.
        """
        size = min(max(self.total_bytes >> 12, SMALLEST_UNIT), LARGEST_UNIT)
        units: list[list[Piece]] = [[]]
        filled = 0
        for file, stat in zip(self.files, self.stats, strict=True):
            for piece in split(file, stat.st_size, size):
                if filled and filled + piece.size > size:
                    units.append([])
                    filled = 0
                units[-1].append(piece)
                filled += piece.size
        return units

    def _advance(self, size: int) -> None:
        self.bytes_read += size


def _expand(inputs: Sequence[Path]) -> list[Path]:
    paths = []
    missing = []
    for path in inputs:
        here = os.path.lexists(path)
        found = [str(path)] if here else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (no hidden files)
        paths += [Path(name) for name in found]
        if not found:
            missing.append(str(path))
    if missing:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    return paths


def _files(path: Path, seen: set[tuple[int, int]], tally: Tally) -> Iterator[Path]:
    return _folder(path, seen, tally) if path.is_dir() else iter([path]) if path.is_file() else _left_out(path, tally)


def _left_out(path: Path, tally: Tally) -> Iterator[Path]:
    reason = "neither a file nor a folder" if path.exists() else "a link that leads nowhere"
    tally.add(reason, str(path))
    return iter(())


def _folder(folder: Path, seen: set[tuple[int, int]], tally: Tally) -> Iterator[Path]:
    try:
        status = folder.stat()
        names = sorted(path.name for path in folder.iterdir())
        listed = _listed_by_datasets(folder)
    except OSError:
        tally.add("unreadable", str(folder))
        return
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        tally.add(TWICE, str(folder))
        return
    seen.add(identity)
    if any(name.endswith(".arrow") for name in names) or DATASET_FILES[2] in names:
        names = [name for name in names if name not in DATASET_FILES]
    if listed:
        names = listed
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from _folder(path, seen, tally)
        elif path.is_file():
            yield path
        else:
            _left_out(path, tally)


def _listed_by_datasets(folder: Path) -> list[str]:
    """The splits of a dataset folder, or the .arrow files of a split, in the order of `datasets`; or nothing."""
    for name, key in (("dataset_dict.json", "splits"), ("state.json", "_data_files")):
        if not (folder / name).is_file():
            continue
        try:
            entries = json.loads((folder / name).read_bytes())[key]
            names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
        except (ValueError, KeyError, TypeError):
            continue  # some other file of that name
        if all(isinstance(name, str) and name == Path(name).name for name in names):
            return names
    return []


def _document(text: str) -> Document | Rejection:
    if not text or text.isspace():
        return Rejection("empty")
    if "\0" in text:
        return Rejection("binary (has NUL characters)")
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return Rejection("not valid UTF-8")
    return Rejection(TOO_LONG) if size > DOCUMENT_LIMIT else Document(text, size)
