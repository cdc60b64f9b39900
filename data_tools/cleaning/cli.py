"""`llada-data filter`, `dedup` and `decontaminate`. Heavy imports wait until a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.options import Inputs, Overwrite, TextKey, Workers, printable, report_rejected
from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from data_tools.cleaning.report import Report
    from data_tools.sources import Sources

SHOWN = 100  # characters of a sample on the terminal

Output = Annotated[
    Path,
    typer.Option(
        help="File to write: .jsonl, .jsonl.gz or .jsonl.zst, one text per line under the key 'text'. "
        "OUTPUT.report.json beside it says what was removed, and why.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(min=0, help="Removed documents in the report, for each rule.")]


def register(app: typer.Typer) -> None:
    app.command("filter")(filter_command)
    app.command("dedup")(dedup_command)
    app.command("decontaminate")(decontaminate_command)


def filter_command(
    inputs: Inputs,
    output: Output,
    rules: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of limits. What it does not name keeps Gopher's value; 'null' switches a rule off. "
            "The report has all rules and limits in force.",
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="Your quality classifier: a Python function that takes a list of texts and returns a score for each. "
            "Each worker loads the file once.",
        ),
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Remove what the classifier scores lower.")] = None,
    samples: Samples = 5,
    text_key: TextKey = "text",
    workers: Workers = 1,
    overwrite: Overwrite = False,
) -> None:
    """Remove documents by quality rules, and by the score of a classifier.

    Without --rules the rules are Gopher's: length, word length, symbols, bullet and ellipsis lines, letters, English
    stop words, and repeated lines, paragraphs and n-grams. They are made for English prose; for code and other
    languages give --rules. A document is counted under the first rule that it breaks.
    """
    from data_tools.cleaning.filter import Judge, filter_documents
    from data_tools.cleaning.output import check_output
    from data_tools.cleaning.report import Report
    from data_tools.cleaning.rules import Rules, load_rules
    from data_tools.sources import Sources
    from llada_train.data.progress import ByteProgress

    if (classifier is None) != (min_score is None):
        raise UserError("--classifier and --min-score go together: give both, or none")
    sources = Sources(inputs, text_key)
    check_output(output, sources, overwrite)
    limits = load_rules(rules) if rules else Rules()
    settings = {"rules": limits.model_dump(mode="json"), "classifier": classifier, "min_score": min_score}
    report = Report(command="filter", inputs=[str(path) for path in inputs], settings=settings)
    judge = Judge(limits, classifier, min_score)
    with ByteProgress(sources.total_bytes) as progress:
        filter_documents(sources, output, judge, report, samples, workers, progress.update)
    _show(report, sources, output)


def dedup_command(
    inputs: Inputs,
    output: Output,
    exact: Annotated[bool, typer.Option("--exact", help="Remove exact duplicates only.")] = False,
    ngram: Annotated[int, typer.Option(min=1, help="Words in a run; documents are compared as sets of runs.")] = 5,
    bands: Annotated[int, typer.Option(min=1, help="Bands of the MinHash signature; more find more.")] = 14,
    rows: Annotated[int, typer.Option(min=1, help="Slots in each band; more find only the more similar.")] = 8,
    samples: Samples = 5,
    text_key: TextKey = "text",
    workers: Workers = 1,
    overwrite: Overwrite = False,
) -> None:
    """Remove exact and near duplicates; the first in the order of the input is kept.

    Exact duplicates have the same text but for white space. Near duplicates are found by MinHash: two documents whose
    sets of word runs have Jaccard similarity s are found with probability 1 − (1 − s^rows)^bands; with the defaults
    that is 5 % for s = 0.5, 56 % for 0.7, 77 % for 0.75, 92 % for 0.8 and more than 99.9 % for 0.9. Duplicates of
    duplicates go, too. It reads the input twice, and needs 40 to 80 bytes of memory and 120 of disk per document.
    """
    from data_tools.cleaning.dedup import deduplicate
    from data_tools.cleaning.minhash import Signer
    from data_tools.cleaning.output import check_output
    from data_tools.cleaning.report import Report
    from data_tools.sources import Sources
    from llada_train.data.progress import ByteProgress

    sources = Sources(inputs, text_key)
    check_output(output, sources, overwrite)
    signer = Signer(ngram, 0 if exact else bands, rows)
    settings: dict[str, object] = {"near_duplicates": not exact}
    if not exact:
        found = {f"{percent / 100}": round(signer.probability(percent / 100), 4) for percent in range(40, 100, 5)}
        settings |= {"ngram": ngram, "bands": bands, "rows": rows, "found_by_similarity": found}
    report = Report(command="dedup", inputs=[str(path) for path in inputs], settings=settings)
    with ByteProgress(2 * sources.total_bytes) as progress:
        deduplicate(sources, output, signer, report, samples, workers, progress.update)
    _show(report, sources, output)


def decontaminate_command(
    inputs: Inputs,
    against: Annotated[
        list[Path],
        typer.Option(
            help="File of one evaluation, named like the task: .jsonl[.gz|.zst] with one example per line, all texts "
            "in it counted, or .txt. May be given many times.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write without the contaminated documents: .jsonl, .jsonl.gz or .jsonl.zst. "
            "OUTPUT.report.json is written beside it.",
            show_default=False,
        ),
    ] = None,
    report_only: Annotated[
        Path | None, typer.Option(help="Remove nothing: write this report, a .json file.", show_default=False)
    ] = None,
    ngram: Annotated[int, typer.Option(min=1, help="Words in a row that make a document contaminated.")] = 13,
    samples: Samples = 5,
    text_key: TextKey = "text",
    workers: Workers = 1,
    overwrite: Overwrite = False,
) -> None:
    """Remove documents that share a run of 13 words with an evaluation, or only count them.

    Case and punctuation do not count. Examples without 13 words in a row cannot be looked for, and are counted. A
    document is counted for each task that it shares words with.
    """
    from data_tools.cleaning.decontaminate import DecontaminationReport, TaskCounts, decontaminate
    from data_tools.cleaning.evaluations import Evaluations
    from data_tools.cleaning.output import check_output, check_place, report_path
    from data_tools.sources import Sources
    from llada_train.data.progress import ByteProgress

    sources = Sources(inputs, text_key)
    if output is not None and report_only is None:
        check_output(output, sources, overwrite)
        report_file = report_path(output)
    elif report_only is not None and output is None:
        check_place(report_only, "--report-only", sources, overwrite)
        report_file = report_only
    else:
        raise UserError("give --output to remove contaminated documents, or --report-only to count them; one of both")
    evaluations = Evaluations.read(against, ngram)
    tasks = {
        task: TaskCounts(examples=examples, examples_too_short=too_short)
        for task, examples, too_short in zip(
            evaluations.tasks, evaluations.examples, evaluations.too_short, strict=True
        )
    }
    report = DecontaminationReport(
        command="decontaminate",
        inputs=[str(path) for path in inputs],
        settings={"ngram": ngram, "against": [str(path) for path in against], "removes": output is not None},
        tasks=tasks,
    )
    with ByteProgress(sources.total_bytes) as progress:
        decontaminate(sources, output, report_file, evaluations, report, samples, workers, progress.update)
    _show(report, sources, output)
    for task, counts in report.tasks.items():
        print(
            f"{task}: in {counts.documents:,} documents; {counts.examples_found:,} of {counts.examples:,} examples "
            f"found, {counts.examples_too_short:,} too short to look for"
        )


def _show(report: "Report", sources: "Sources", output: Path | None) -> None:
    """Counts on stdout; what was left out, and a sample of what each rule removed, on stderr."""
    report_rejected(sources)
    removed = dict(sorted(report.removed.items(), key=lambda item: -item[1].documents))
    verb = "removed" if output is not None else "contaminated"
    for rule, counts in removed.items():
        for sample in counts.samples[:1]:
            shown = printable(sample.text[:SHOWN])
            text = " ".join(shown.split())
            typer.echo(f"{verb}, {rule}: document {sample.document} ({sample.why}): {text}", err=True)
    rows = [
        ("documents", report.documents, report.text_bytes),
        ("kept" if output else "clean", report.kept_documents, report.kept_text_bytes),
    ]
    rows += [(f"{verb}, {rule}", counts.documents, counts.text_bytes) for rule, counts in removed.items()]
    width = max(len(name) for name, _, _ in rows)
    for name, documents, text_bytes in rows:
        print(f"{name:{width}}  {documents:>12,}  {documents / report.documents:7.2%}  {text_bytes / 1e6:>12,.1f} MB")
    if output is not None:
        print(f"written: {output}")
