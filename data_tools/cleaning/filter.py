"""Documents → those that break no quality rule."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.cleaning.classifier import Score, load_classifier, scores
from data_tools.cleaning.output import document_writer, report_path
from data_tools.cleaning.report import Report, Sample, excerpt
from data_tools.cleaning.rules import Broken, Rules, broken_rules
from data_tools.cleaning.workers import map_texts
from data_tools.sources import Sources


class Judge:
    """Texts → the first rule that each breaks, or None. Only what has passed the rules is shown to the classifier."""

    def __init__(self, rules: Rules, classifier: str | None = None, min_score: float | None = None) -> None:
        """
        Raises:
            UserError: the classifier cannot be loaded.
        """
        self._rules, self._classifier, self._min_score = rules, classifier, min_score
        if classifier is not None:
            self._score  # noqa: B018 - a fault is told before any work

    @cached_property
    def _score(self) -> Score:
        assert self._classifier is not None
        return load_classifier(self._classifier)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_score"}  # each worker loads its own

    def __call__(self, texts: list[str]) -> list[Broken | None]:
        verdicts = [next(broken_rules(text, self._rules), None) for text in texts]
        good = [i for i, verdict in enumerate(verdicts) if verdict is None]
        if self._classifier is not None and self._min_score is not None and good:
            values = scores(self._score, self._classifier, [texts[i] for i in good])
            for i, value in zip(good, values, strict=True):
                if not value >= self._min_score:  # NaN is no score
                    verdicts[i] = ("quality_score", value)
        return verdicts


def filter_documents(
    sources: Sources,
    output: Path,
    judge: Judge,
    report: Report,
    samples: int,
    workers: int,
    progress: Callable[[int, str], None],
) -> None:
    """Write the documents that `judge` passes, in order, and fill and write `report`.

    `progress(bytes read, note)` is called now and then.

    Raises:
        UserError: no document was read or kept, the input changed, the classifier failed, or a worker died. Nothing is
            written then.
    """
    with document_writer(output) as write:
        for document, broken in map_texts(judge, sources, workers):
            if broken is None:
                write(document.text)
            else:
                rule, value = broken
                sample = Sample(document=report.documents, why=f"measured {value:.4g}", text=excerpt(document.text))
                report.remove(rule, document).offer(sample, samples)
            report.count(document, kept=broken is None)
            progress(sources.bytes_read, f"{report.kept_documents:,} of {report.documents:,} documents kept")
        sources.refuse_changed()
        report.finish(sources)
        report.save(report_path(output))
