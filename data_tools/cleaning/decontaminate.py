"""Documents → those that share no n-gram of words with an evaluation (Brown et al., 2020, appendix C)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from data_tools.cleaning.evaluations import Evaluations
from data_tools.cleaning.output import document_writer
from data_tools.cleaning.report import Report, Sample, excerpt
from data_tools.cleaning.words import bare_words, hash_ngrams, hash_words
from data_tools.cleaning.workers import map_texts
from data_tools.sources import Sources


class TaskCounts(BaseModel):
    """How much of one task is in the documents."""

    documents: int = 0  # that share an n-gram with the task
    examples: int  # of the task
    examples_found: int = 0  # with at least one n-gram in a document
    examples_too_short: int  # to be looked for: no n words in a row


class DecontaminationReport(Report):
    tasks: dict[str, TaskCounts]


@dataclass(frozen=True)
class Hits:
    """What one document shares with the evaluations."""

    rows: np.ndarray  # indices into the evaluations' n-grams
    ngram: str  # the first that is shared


class Finder:
    """Texts → what each shares with the evaluations, or None."""

    def __init__(self, evaluations: Evaluations) -> None:
        self._hashes, self._ngram = evaluations.hashes, evaluations.ngram

    def __call__(self, texts: list[str]) -> list[Hits | None]:
        return [self._find(text) for text in texts]

    def _find(self, text: str) -> Hits | None:
        words = bare_words(text)
        ngrams = hash_ngrams(hash_words(words), self._ngram)
        begin = np.searchsorted(self._hashes, ngrams, "left")
        end = np.searchsorted(self._hashes, ngrams, "right")
        [shared] = np.nonzero(end > begin)
        if not len(shared):
            return None
        rows = np.unique(np.concatenate([np.arange(begin[i], end[i]) for i in shared]))
        return Hits(rows, " ".join(words[shared[0] : shared[0] + self._ngram]))


def decontaminate(
    sources: Sources,
    output: Path | None,
    report_file: Path,
    evaluations: Evaluations,
    report: DecontaminationReport,
    samples: int,
    workers: int,
    progress: Callable[[int, str], None],
) -> None:
    """Write the documents that share nothing, in order, if there is an `output`, and fill and write `report`.

    A document that shares n-grams with several tasks counts for each, and is removed by the first. `progress(bytes
    read, note)` is called now and then.

    Raises:
        UserError: no document was read, none kept, the input changed, or a worker died. Nothing is written then.
    """
    found = np.zeros(sum(evaluations.examples), dtype=bool)
    removed_documents = 0
    with _writer(output) as write:
        for document, hits in map_texts(Finder(evaluations), sources, workers):
            if hits is None:
                write(document.text)
            else:
                removed_documents += 1
                found[evaluations.example[hits.rows]] = True
                tasks = [evaluations.tasks[task] for task in np.unique(evaluations.task[hits.rows])]
                for task in tasks:
                    report.tasks[task].documents += 1
                sample = Sample(document=report.documents, why=f"shares: {hits.ngram}", text=excerpt(document.text))
                report.remove(tasks[0], document).offer(sample, samples)
            report.count(document, kept=hits is None)
            progress(sources.bytes_read, f"{removed_documents:,} of {report.documents:,} documents contaminated")
        start = 0
        for task, count in zip(evaluations.tasks, evaluations.examples, strict=True):
            report.tasks[task].examples_found = int(found[start : start + count].sum())
            start += count
        sources.refuse_changed()
        report.finish(sources, written=output is not None)
        report.save(report_file)


@contextmanager
def _writer(output: Path | None) -> Iterator[Callable[[str], None]]:
    if output is None:
        yield lambda text: None
    else:
        with document_writer(output) as write:
            yield write
