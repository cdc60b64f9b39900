"""`llada-train evaluate`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llada_train.commands.console import counted_progress
from llada_train.commands.inputs import check_length, json_lines, load_denoiser, load_model, write_whole
from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from llada_train.evaluation.answers import AnswersReport
    from llada_train.evaluation.filling import Accuracy
    from llada_train.evaluation.report import HeldOutReport
    from llada_train.evaluation.suite import Suite
    from llada_train.evaluation.tasks import TaskResult
    from llada_train.evaluation.text_file import TextReport


def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint or a Hugging Face folder.")
    ],
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = None,
    suite: Annotated[
        Path | None, typer.Option(help="Tasks with shots and settings, as configs/evaluation/llada_base.yaml.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in the prompts of --tasks.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts of --tasks in LLaDA's chat format.")] = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the model, as cfg=0.5 or samples=32.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; for a try.")] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Let tasks run the code that the model writes.")] = False,
    text: Annotated[Path | None, typer.Option(help="Bits per byte of a text file, by t.")] = None,
    plot: Annotated[Path | None, typer.Option(help="With --text: write its curve here, as PNG.")] = None,
    spans: Annotated[Path | None, typer.Option(help="Accuracy of filling in spans of a text file.")] = None,
    reversal: Annotated[
        Path | None, typer.Option(help="JSON lines with first and second: each from the other, by infilling.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time; results do not depend on it.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON to this file instead.")] = None,
) -> None:
    """Measure a model, on a GPU (bf16) if there is one: by default a run, by its bound on the held-out documents.

    That stands against unigram and bigram models of the same tokens. Of a fine-tuned run, the bound is that on the
    held-out responses, and answers that are exact are counted. Under torchrun, tasks are shared by its processes.

    Example: llada-train evaluate runs/demo/hf --tasks hellaswag,piqa --set cfg=0.5
    """
    kinds = {"tasks": tasks, "suite": suite, "text": text, "spans": spans, "reversal": reversal}
    given = [f"--{kind}" for kind, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"evaluate: {' and '.join(given)}; give one of them")
    if plot is not None and text is None:
        raise UserError("evaluate: --plot draws what --text measures; give that, too")
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: no folder {path.parent}; make it first")
    if tasks is not None or suite is not None:
        found: Any = _tasks(
            source, _suite(tasks, suite, shots, chat, setting or []), include, limit, run_code, batch_size
        )
        if os.environ.get("RANK", "0") != "0":
            return
        table = _task_table(found)
    elif text is not None:
        found, table = _text(source, text, plot, batch_size)
    elif spans is not None:
        found, table = _spans(source, spans, batch_size)
    elif reversal is not None:
        found, table = _reversal(source, reversal, batch_size)
    else:
        from llada_train.evaluation.answers import AnswersReport

        found = _held_out(source)
        table = _answers_table(found) if isinstance(found, AnswersReport) else _held_out_table(found)
    plain = [dataclasses.asdict(one) for one in found] if isinstance(found, list) else dataclasses.asdict(found)
    content = json.dumps(plain, indent=2, ensure_ascii=False)
    if output is not None:
        write_whole(output, f"{content}\n")
    elif as_json:
        typer.echo(content)
    else:
        from rich.console import Console

        Console().print(table)


def _suite(tasks: str | None, path: Path | None, shots: int | None, chat: bool, changes: list[str]) -> "Suite":
    from pydantic import ValidationError
    from ruamel.yaml import YAML

    from llada_train.evaluation.suite import Settings, Suite, Task, problems, read_suite

    changed = {}
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"--set {change}: expected KEY=VALUE, as cfg=0.5")
        changed[key] = YAML(typ="safe", pure=True).load(value)
    try:
        if path is not None:
            suite = read_suite(path)
            if shots is not None or chat:
                raise UserError("evaluate: --shots and --chat are of --tasks; a suite has its own")
            return suite.model_copy(update={"settings": Settings(**{**suite.settings.model_dump(), **changed})})
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        if not names:
            raise UserError("evaluate: --tasks names none")
        suite = Suite(
            settings=Settings(**changed), tasks=tuple(Task(task=name, shots=shots, chat=chat) for name in names)
        )
        suite.settings.sampling([0])
        return suite
    except ValidationError as error:
        raise UserError(f"--set: {problems(error)}") from None


def _tasks(
    source: Path, suite: "Suite", include: Path | None, limit: int | None, run_code: bool, batch_size: int
) -> "list[TaskResult]":
    from llada_train.convert.load import describe
    from llada_train.evaluation.tasks import check_tasks, run_tasks

    manager = check_tasks(suite, include)
    describe(source)
    from llada_train.evaluation.harness import HarnessModel

    model = HarnessModel(str(source), batch_size)
    with counted_progress("requests", "requests") as advance:
        model.on_progress = advance
        return run_tasks(model, suite, manager, limit, run_code)


def _task_table(results: "list[TaskResult]") -> "Table":
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", "documents", "result", "published, %"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for one in results:
        error = f" ± {one.standard_error:.4f}" if one.standard_error is not None else ""
        published = f"{one.published}" if one.published is not None else ""
        table.add_row(one.task, one.metric, f"{one.documents:,}", f"{one.value:.4f}{error}", published)
    return table


def _text(source: Path, path: Path, plot: Path | None, batch_size: int) -> "tuple[TextReport, Table]":
    from rich.table import Table

    from llada_train.convert.load import describe
    from llada_train.evaluation.text_file import draw, text_ids, text_report

    model, tokenizer = describe(source)
    text_ids(path, tokenizer)
    plain, _ = load_model(source)
    with counted_progress("rows", "rows") as advance:
        report = text_report(
            lambda ids: plain(ids.to(plain.device)).logits,
            path,
            tokenizer,
            model.max_sequence_length,
            batch_size,
            on_progress=advance,
        )
    if plot is not None:
        draw(report, plot)
    left_over = f"; {report.left_over:,} at the end, less than a row, are not measured" if report.left_over else ""
    table = Table(title=f"{report.tokens:,} tokens, {report.text_bytes:,} bytes{left_over}")
    table.add_column("t")
    table.add_column("bits per byte", justify="right")
    for one in report.buckets:
        table.add_row(f"{one.t_from:.1f} – {one.t_to:.1f}", f"{one.bits_per_byte:.3f} ± {one.standard_error:.3f}")
    table.add_row("bound", f"{report.bits_per_byte:.3f} ± {report.standard_error:.3f}")
    return report, table


def _spans(source: Path, path: Path, batch_size: int) -> "tuple[list[Accuracy], Table]":
    from llada_train.convert.load import describe
    from llada_train.evaluation.filling import span_accuracy
    from llada_train.evaluation.text_file import text_ids

    model, tokenizer = describe(source)
    ids = text_ids(path, tokenizer)
    denoiser, _ = load_denoiser(source)
    with counted_progress("span lengths", "lengths") as advance:
        found = span_accuracy(denoiser, ids, tokenizer, model.max_sequence_length, batch_size, on_progress=advance)
    return found, _accuracy_table(found)


def _reversal(source: Path, path: Path, batch_size: int) -> "tuple[list[Accuracy], Table]":
    from llada_train.convert.load import describe
    from llada_train.evaluation.filling import reversal_accuracy

    pairs: list[tuple[str, str]] = []
    for number, row in enumerate(json_lines(path, ("first",)), 1):
        first, second = row["first"], row.get("second")
        if not (isinstance(first, str) and isinstance(second, str) and first and second):
            raise UserError(f"{path}: pair {number}: expected the texts first and second")
        pairs.append((first, second))
    model, tokenizer = describe(source)
    for number, pair in enumerate(pairs, 1):
        tokens = sum(len(ids) for ids in tokenizer.encode_batch(pair))
        check_length(tokens, model, f"{path}: pair {number}")
    denoiser, _ = load_denoiser(source)
    with counted_progress("directions", "directions") as advance:
        found = reversal_accuracy(denoiser, pairs, tokenizer, batch_size, advance)
    return found, _accuracy_table(found)


def _accuracy_table(found: "list[Accuracy]") -> "Table":
    from rich.table import Table

    table = Table()
    for column in ("", "cases", "exact", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    for one in found:
        table.add_row(one.what, f"{one.cases:,}", f"{one.exact:.3f} ± {one.standard_error:.3f}", f"{one.tokens:.3f}")
    return table


def _held_out(source: Path) -> "HeldOutReport | AnswersReport":
    from llada_train.checkpoint.reader import open_verified
    from llada_train.convert.load import best_device
    from llada_train.convert.plain import plain_model
    from llada_train.data.opening import open_data
    from llada_train.data.rows import PretrainingData
    from llada_train.data.sft import SftData
    from llada_train.evaluation.answers import answers_report
    from llada_train.evaluation.report import held_out_report
    from llada_train.sampling.denoiser import PlainDenoiser

    device, dtype = best_device()
    with open_verified(source) as weights:
        config = weights.config
        plain = plain_model(weights, config.model, dtype).to(device)
    data = open_data(config)
    if isinstance(data, SftData):
        with counted_progress("answers to held-out prompts", "tokens") as advance:
            return answers_report(PlainDenoiser(plain, data.tokenizer.vocab_size), data, advance)
    assert isinstance(data, PretrainingData)
    with counted_progress("bound on held-out rows", "rows") as advance:
        return held_out_report(lambda ids: plain(ids.to(device)).logits, data, config, advance)


def _answers_table(report: "AnswersReport") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    exact = f"{report.exact_matches:,} of {report.examples:,} held-out answers exact ({report.exact_match:.1%})"
    table = Table(title=f"{exact}; bound {report.bound:.3f} nats per token of responses")
    for column in ("prompt", "response", "answered"):
        table.add_column(column)
    for row in report.samples:
        table.add_row(*map(escape, row))
    return table


def _held_out_table(report: "HeldOutReport") -> "Table":
    from rich.table import Table

    table = Table(title=f"{report.tokens:,} held-out tokens, {report.text_bytes:,} bytes")
    for column in ("", "nats per token", "bits per byte"):
        table.add_column(column, justify="right" if column else "left")
    error = f"± {report.bound_standard_error:.3f}"
    for name, score, spread in (
        ("model, upper bound", report.bound, error),
        ("bigram, add-one", report.bigram, ""),
        ("unigram entropy", report.unigram, ""),
    ):
        table.add_row(name, f"{score.nats_per_token:.3f} {spread:7}", f"{score.bits_per_byte:.3f}")
    return table
