"""What a cleaning command did: counts, and some of the removed documents to look at."""

import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr

from data_tools.cleaning.output import whole_file
from data_tools.sources import Document, Sources
from llada_train.config.errors import UserError

EXCERPT = 500  # characters


class Sample(BaseModel):
    """One removed document."""

    document: int  # its place in the input, from 0, rejected records not counted
    why: str
    text: str  # its beginning
    other_text: str | None = None  # the beginning of the document that was kept instead


class Removed(BaseModel):
    """What one rule removed."""

    documents: int = 0
    text_bytes: int = 0
    samples: list[Sample] = Field(default_factory=list)
    _random: random.Random = PrivateAttr(default_factory=lambda: random.Random(0))

    def offer(self, sample: Sample, limit: int) -> None:
        """Show the document that was counted last; each has the same chance to stay among the `limit` samples."""
        if len(self.samples) < limit:
            self.samples.append(sample)
        elif (place := self._random.randrange(self.documents)) < limit:
            self.samples[place] = sample


class Report(BaseModel):
    """Written as OUTPUT.report.json."""

    command: str
    inputs: list[str]
    settings: dict[str, Any]
    documents: int = 0
    text_bytes: int = 0  # in UTF-8
    kept_documents: int = 0
    kept_text_bytes: int = 0
    removed: dict[str, Removed] = Field(default_factory=dict)
    rejected: dict[str, int] = Field(default_factory=dict)  # records that could not be read, by reason

    def count(self, document: Document, kept: bool) -> None:
        self.documents += 1
        self.text_bytes += document.text_bytes
        if kept:
            self.kept_documents += 1
            self.kept_text_bytes += document.text_bytes

    def remove(self, rule: str, document: Document) -> Removed:
        """Count a document that `rule` removes."""
        removed = self.removed.setdefault(rule, Removed())
        removed.documents += 1
        removed.text_bytes += document.text_bytes
        return removed

    def finish(self, sources: Sources, written: bool = True) -> None:
        """
        Raises:
            UserError: no document was read, or none kept although they are `written`.
        """
        self.rejected = dict(sources.rejected)
        if not self.documents:
            why = "".join(f"; {reason}: {count:,}" for reason, count in self.rejected.items())
            raise UserError(f"empty text: none of the inputs has a document{why}")
        if written and not self.kept_documents:
            why = ", ".join(f"{rule}: {removed.documents:,}" for rule, removed in self.removed.items())
            raise UserError(f"all {self.documents:,} documents would be removed ({why}); nothing is written")

    def save(self, path: Path) -> None:
        with whole_file(path) as file:
            file.write((self.model_dump_json(indent=2, exclude_none=True) + "\n").encode("utf-8"))


def excerpt(text: str) -> str:
    return text[:EXCERPT]
