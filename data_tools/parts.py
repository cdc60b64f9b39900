"""What `tokenize` has finished so far: PREFIX.parts/, and how it becomes the corpus.

plan.json               what is to be done, and a key that tells it from any other work
00042.bin, .idx         the corpus of unit 42 alone; missing if it has no document
00042.json              its counts; written last, so what has one is whole
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_tools.sources import Tally
from llada_train.config.errors import UserError
from llada_train.data.corpus import Checksums, Manifest, corpus_files
from llada_train.data.corpus_writer import CorpusWriter, token_dtype
from llada_train.data.indexed import IndexedFile
from llada_train.data.tokenizer import Tokenizer

VERSION = 2  # of what a part holds: another one begins again


@dataclass(frozen=True)
class PartReport:
    """What came of one unit."""

    documents: int
    tokens: int
    text_bytes: int
    bin_sha256: str | None
    """Of the part's .bin, in hexadecimal; None if there is none."""
    tally: Tally
    sha256: list[tuple[str, str]]
    """Each file that begins in the unit, and its checksum in hexadecimal."""


class Parts:
    """The folder of finished parts of a corpus, locked against others. A context manager."""

    def __init__(self, prefix: Path, plan: dict[str, Any], lock: int) -> None:
        """Use `begin` or `resume`."""
        self.prefix = prefix
        self.folder = parts_folder(prefix)
        self.key: str = plan["key"]
        self.count: int = plan["count"]
        self._plan = plan
        self._lock = lock

    @classmethod
    def begin(
        cls, prefix: Path, sources_plan: dict[str, Any], tokenizer: Tokenizer, count: int, overwrite: bool, alone: bool
    ) -> Self:
        """Begin, or go on with, `count` parts of what `sources_plan` says. `alone` if no other process works at them.

        Raises:
            UserError: the folder cannot be made, is in use, or holds parts of other work and not `overwrite`, which
                shares may not.
        """
        folder = parts_folder(prefix)
        plan: dict[str, Any] = {
            "count": count,
            "files": len(sources_plan["files"]),
            "rejected": sources_plan["rejected"],
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
            },
        }
        plan["key"] = hashlib.sha256(json.dumps([VERSION, plan, sources_plan]).encode()).hexdigest()
        try:
            _end_merge(prefix)
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(prefix, folder, alone)
        except OSError as error:
            raise UserError(f"{prefix}: cannot be written: {error.strerror}") from None
        parts = cls(prefix, plan, lock)
        try:
            parts._adopt(overwrite, alone)
        except BaseException:
            os.close(lock)
            raise
        return parts

    @classmethod
    def resume(cls, prefix: Path) -> Self:
        """What `begin` began.

        Raises:
            UserError: there is no such folder, or it is in use.
        """
        _end_merge(prefix)
        plan = _read_plan(prefix)
        if plan is None:
            raise UserError(f"{parts_folder(prefix)}: no parts; make them with `llada-data tokenize --shard`")
        return cls(prefix, plan, _lock(prefix, parts_folder(prefix), alone=True))

    def _adopt(self, overwrite: bool, alone: bool) -> None:
        """Make the folder one of this plan."""
        found = _read_plan(self.prefix)
        if found is not None and found["key"] == self.key:
            return
        if found is not None:
            if not (overwrite and alone):  # other shares might be at work already
                again = "--overwrite to begin again" if alone else "remove it to begin again"
                raise UserError(
                    f"{self.folder}: holds parts of other work: the inputs, the text key or the tokenizer have changed "
                    f"since it was begun; give another --output, or {again}"
                )
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        _write(self.folder / "plan.json", json.dumps(self._plan))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def part(self, i: int) -> Path:
        """The prefix of part i."""
        return self.folder / f"{i:05d}"

    def missing(self, among: Sequence[int]) -> list[int]:
        """Which of these parts are not finished."""
        return [i for i in among if not self._report_path(i).exists()]

    def write_report(self, i: int, report: PartReport) -> None:
        _write(self._report_path(i), json.dumps({"key": self.key, **vars(report), "tally": vars(report.tally)}))

    def report(self, i: int) -> PartReport:
        """Of a finished part.

        Raises:
            UserError: it is not a part of this work.
        """
        path = self._report_path(i)
        try:
            fields = json.loads(path.read_bytes())
            key, tally = fields.pop("key"), fields.pop("tally")
            report = PartReport(**fields, tally=Tally(Counter(tally["rejected"]), tally["first"]))
        except (ValueError, KeyError, TypeError):
            key, report = None, PartReport(0, 0, 0, None, Tally(), [])
        if key != self.key:
            raise UserError(f"{path}: damaged, or a part of other work; remove it, and tokenize again")
        return report

    def merge(self) -> Manifest:
        """All parts, in order, become the corpus; each byte is copied once. The folder is removed in the end.

        Raises:
            UserError: a part is missing or damaged, or there is no document in any.
        """
        if missing := self.missing(range(self.count)):
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.count} parts are missing, the first is {missing[0]}: run the "
                "`llada-data tokenize --shard` commands again, which pass over what is finished, and copy the parts"
            )
        reports = [self.report(i) for i in range(self.count)]
        tokenizer = self._plan["tokenizer"]
        listing = b"".join(_checksum_line(*line) for report in reports for line in report.sha256)
        tally = Tally(Counter(self._plan["rejected"]))
        for report in reports:
            tally.rejected.update(report.tally.rejected)
        if not any(report.documents for report in reports):
            shutil.rmtree(self.folder)
            reasons = "".join(f"; {reason}: {count:,}" for reason, count in tally.rejected.items())
            raise UserError(f"empty text: no document in what was given (files: {self._plan['files']}){reasons}")
        dtype = token_dtype(tokenizer["vocab_size"])
        with CorpusWriter(self.prefix, dtype) as writer:
            for i, report in enumerate(reports):
                if report.documents:
                    part = IndexedFile(str(self.part(i)))
                    sound = (part.num_documents, part.num_tokens) == (report.documents, report.tokens)
                    if not sound or part.damage() or writer.add_file(part) != report.bin_sha256:
                        raise UserError(f"{part.prefix}: is not what its .json says; remove that, and tokenize again")
        _write(inputs_file(self.prefix), listing)
        merged = _merged_folder(self.prefix)
        self.folder.replace(merged)  # so that it can be told whether the manifest, and all else, is of these parts
        manifest = Manifest(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            text_bytes=sum(report.text_bytes for report in reports),
            tokenizer_fingerprint=tokenizer["fingerprint"],
            vocab_size=tokenizer["vocab_size"],
            eos_id=tokenizer["eos_id"],
            dtype=dtype.name,
            rejected=dict(sorted(tally.rejected.items())),
            checksums=Checksums(
                bin=writer.bin_hash.hexdigest(),
                idx=writer.idx_hash.hexdigest(),
                inputs=hashlib.sha256(listing).hexdigest(),
            ),
        )
        manifest.save(self.prefix)
        shutil.rmtree(merged)
        return manifest

    def _report_path(self, i: int) -> Path:
        return self.folder / f"{i:05d}.json"


def parts_folder(prefix: Path) -> Path:
    return prefix.parent / f"{prefix.name}.parts"


def inputs_file(prefix: Path) -> Path:
    """The checksums of all input files, for `sha256sum --check`."""
    return prefix.parent / f"{prefix.name}.inputs.sha256"


def refuse_existing(prefix: Path) -> None:
    """
    Raises:
        UserError: there is a corpus at `prefix`, other than one that `merge` was interrupted at.
    """
    _end_merge(prefix)
    existing = [path for path in corpus_files(prefix) if path.exists()]
    if existing and (existing[-1].suffix == ".json" or not parts_folder(prefix).exists()):
        names = ", ".join(map(str, existing))
        raise UserError(f"{names}: already there; give another --output, or --overwrite to replace")


def _end_merge(prefix: Path) -> None:
    """Tidy up after a `merge` that was killed: it was finished if there is a manifest, else it is to be done again."""
    merged = _merged_folder(prefix)
    if not merged.exists():
        return
    lock = _lock(prefix, merged, alone=True)
    if corpus_files(prefix)[-1].exists():
        shutil.rmtree(merged)
    else:
        merged.replace(parts_folder(prefix))
    os.close(lock)


def _merged_folder(prefix: Path) -> Path:
    return prefix.parent / f"{prefix.name}.parts.merged"


def _read_plan(prefix: Path) -> dict[str, Any] | None:
    path = parts_folder(prefix) / "plan.json"
    try:
        plan: dict[str, Any] = json.loads(path.read_bytes())
        return plan
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: damaged; remove {path.parent}, and tokenize again") from None


def _lock(prefix: Path, folder: Path, alone: bool) -> int:
    """Held until it is closed, or the process ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{prefix}: another llada-data is at work on it; wait until it has ended") from None
    return descriptor


def _write(path: Path, content: str | bytes) -> None:
    """Whole or not at all, even if the machine stops."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _checksum_line(path: str, digest: str) -> bytes:
    """As sha256sum writes it, and reads it with --check."""
    escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return (b"\\" if escaped != path else b"") + f"{digest}  ".encode() + os.fsencode(escaped) + b"\n"
