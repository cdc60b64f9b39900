"""Documents → the first of each set of exact or near duplicates.

Two passes over the input. The first writes the keys of all documents, one column after another, to files without a name
(8 bytes per document and column); then the columns are sorted one by one, and documents with equal keys joined; the
second writes each document that is the first of its set. Sets are transitive: what resembles a near duplicate of a
document goes with it.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from data_tools.cleaning.minhash import Signer
from data_tools.cleaning.output import document_writer, report_path
from data_tools.cleaning.report import Report, Sample, excerpt
from data_tools.cleaning.workers import map_texts
from data_tools.sources import Document, Sources
from llada_train.config.errors import UserError

BLOCK = 1 << 12  # documents whose keys are written at once

Progress = Callable[[int, str], None]


def deduplicate(
    sources: Sources, output: Path, signer: Signer, report: Report, samples: int, workers: int, progress: Progress
) -> None:
    """Write the first document of each set, in order, and fill and write `report`; the same for any `workers`.

    `progress(bytes read in both passes, note)` is called now and then.

    Raises:
        UserError: no document was read, the input changed between the passes, or a worker died. Nothing is written.
    """
    checksums = [0, 0]
    with document_writer(output) as write:
        documents = _checked(sources, checksums, 0)
        keys = _keys(documents, signer, workers, lambda note: progress(sources.bytes_read, note))
        first, exact = _sets(keys, 1 + signer.bands, output.parent)
        pairs = _Pairs(signer, first, exact, samples)
        first_pass = sources.bytes_read
        for i, document in enumerate(_checked(sources, checksums, 1)):
            if i == len(first):
                break  # the checksums tell
            kept = bool(first[i] == i)
            if kept:
                write(document.text)
                pairs.see_kept(i, document.text)
            else:
                removed = report.remove("exact" if exact[i] else "near", document)
                removed.samples += pairs.sample(i, document.text)
            report.count(document, kept)
            note = f"{report.kept_documents:,} of {report.documents:,} documents kept"
            progress(first_pass + sources.bytes_read, note)
        if checksums[0] != checksums[1]:
            raise UserError("the input changed while it was read; nothing is written")
        report.finish(sources)
        report.save(report_path(output))


def _checked(sources: Sources, checksums: list[int], which: int) -> Iterator[Document]:
    for document in sources:
        text = document.text.encode("utf-8")
        checksums[which] = zlib.crc32(text, zlib.crc32(len(text).to_bytes(8, "little"), checksums[which]))
        yield document


def _keys(
    documents: Iterator[Document], signer: Signer, workers: int, progress: Callable[[str], None]
) -> Iterator[np.ndarray]:
    """Blocks of keys, uint64[documents, columns], in order."""
    rows: list[np.ndarray] = []
    for done, (_, row) in enumerate(map_texts(signer, documents, workers), start=1):
        rows.append(row)
        if len(rows) == BLOCK:
            progress(f"{done:,} documents")
            yield np.stack(rows)
            rows.clear()
    if rows:
        yield np.stack(rows)


def _sets(blocks: Iterator[np.ndarray], columns: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """For each document the first one of its set, int64[N], and whether column 0 alone joins them, bool[N]."""
    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile(dir=folder)) for _ in range(columns)]
        count = 0
        for block in blocks:
            count += len(block)
            for column, file in enumerate(files):
                file.write(block[:, column].tobytes())
        first = np.arange(count)
        for column, file in enumerate(files):
            file.seek(0)
            join_equal(first, np.frombuffer(file.read(), dtype=np.uint64))
            if column == 0:
                exact = first != np.arange(count)
    return first, exact


def join_equal(first: np.ndarray, keys: np.ndarray) -> None:
    """Join the sets of all documents with the same key other than 0, in place.

    `first` int64[N] is, for each document, the lowest number in its set, before and after. `keys` is uint64[N].
    """
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]) & (keys[order[1:]] != 0))
    a, b = order[equal], order[equal + 1]
    while True:
        low, high = np.minimum(first[a], first[b]), np.maximum(first[a], first[b])
        apart = low != high
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        first[high[apart]] = low[apart]  # of several, any: those that lose come again
        while not np.array_equal(shorter := first[first], first):
            first[:] = shorter


class _Pairs:
    """Some removed documents, chosen at random, and the documents that were kept instead."""

    def __init__(self, signer: Signer, first: np.ndarray, exact: np.ndarray, count: int) -> None:
        self._signer = signer
        choose = random.Random(0)
        self._kept_of: dict[int, int] = {}
        for removed in (np.flatnonzero(exact), np.flatnonzero((first != np.arange(len(first))) & ~exact)):
            for i in choose.sample(range(len(removed)), min(count, len(removed))):
                self._kept_of[int(removed[i])] = int(first[removed[i]])
        self._wanted = set(self._kept_of.values())
        self._seen: dict[int, tuple[str, np.ndarray]] = {}

    def see_kept(self, i: int, text: str) -> None:
        if i in self._wanted:
            self._seen[i] = excerpt(text), np.unique(self._signer.ngrams(text))

    def sample(self, i: int, text: str) -> list[Sample]:
        """One if document `i` was chosen, else none. The document kept for it has been seen: it comes first."""
        if i not in self._kept_of:
            return []
        kept = self._kept_of[i]
        other, kept_ngrams = self._seen[kept]
        ngrams = np.unique(self._signer.ngrams(text))
        union = len(np.union1d(ngrams, kept_ngrams))
        similarity = len(np.intersect1d(ngrams, kept_ngrams)) / union if union else 1.0
        why = f"Jaccard similarity {similarity:.2f} with document {kept}"
        return [Sample(document=i, why=why, text=excerpt(text), other_text=other)]
