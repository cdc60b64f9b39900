"""`llada-train evaluate`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llada_train.commands.console import counted_progress
from llada_train.commands.inputs import check_length, json_lines, write_whole
from llada_train.commands.layout import PipelineParallel, Processes, TensorParallel, checked_layout, start_processes
from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from llada_train.convert.load import Loaded
    from llada_train.evaluation.answers import AnswersReport
    from llada_train.evaluation.filling import Accuracy
    from llada_train.evaluation.report import HeldOutReport
    from llada_train.evaluation.suite import Suite
    from llada_train.evaluation.tasks import TaskResult
    from llada_train.evaluation.text_file import TextReport


def evaluate(
    context: typer.Context,
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
    processes: Processes = None,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Measure a model, on GPUs (bf16) if there are any: by default a run, by its bound on the held-out documents.

    That stands against unigram and bigram models of the same tokens. Of a fine-tuned run, the bound is that on the
    held-out responses, and answers that are exact are counted. With --processes 8 eight copies of the model share the
    rows; with --tensor-parallel 4, too, two copies of four parts each. Results do not depend on it.

    Example: llada-train evaluate runs/demo/hf --tasks hellaswag,piqa --set cfg=0.5
    """
    kinds = {"tasks": tasks, "suite": suite, "text": text, "spans": spans, "reversal": reversal}
    given = [f"--{kind}" for kind, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"evaluate: {' and '.join(given)}; give one of them")
    if plot is not None and text is None:
        raise UserError("evaluate: --plot draws what --text measures; give that, too")
    of_tasks = {"--shots": shots, "--set": setting, "--include": include, "--limit": limit}
    switches = {"--chat": chat, "--run-code": run_code}
    alone = [name for name, value in {**of_tasks, **switches}.items() if value not in (None, False)]
    if alone and tasks is None and suite is None:
        raise UserError(f"evaluate: {' and '.join(alone)}: for tasks alone; give --tasks or --suite, too")
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: no folder {path.parent}; make it first")
    from llada_train.checkpoint.store import check_model

    check_model(source)  # before the slow imports
    if tasks is not None or suite is not None:
        measure = _tasks(_suite(tasks, suite, shots, chat, setting or []), include, limit, run_code)
    elif text is not None:
        measure = _text(source, text, plot)
    elif spans is not None:
        measure = _spans(source, spans)
    elif reversal is not None:
        measure = _reversal(source, reversal)
    else:
        measure = _held_out(source)
    from llada_train.convert.load import describe

    layout = checked_layout(describe(source)[0], processes, tensor_parallel, pipeline_parallel)
    start_processes(context, processes)
    from llada_train.convert.load import loaded

    with loaded(source, layout) as model:
        model.lead(lambda: _tell(*measure(model, batch_size * model.copies), as_json, output))


def _tell(found: Any, table: "Table", as_json: bool, output: Path | None) -> None:
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


Measure = Callable[["Loaded", int], tuple[Any, "Table"]]
"""Gets a model and how many rows it takes at a time; gives what was found, as data and as a table."""


def _tasks(suite: "Suite", include: Path | None, limit: int | None, run_code: bool) -> Measure:
    from llada_train.evaluation.tasks import check_tasks, run_tasks

    manager = check_tasks(suite, include)

    def measure(loaded: "Loaded", batch_size: int) -> "tuple[list[TaskResult], Table]":
        from llada_train.evaluation.harness import HarnessModel

        model = HarnessModel(loaded, batch_size // loaded.copies)
        model.on_doubt = lambda message: typer.echo(f"warning: {message}", err=True)
        with counted_progress("requests", "requests") as advance:
            model.on_progress = advance
            found = run_tasks(model, suite, manager, limit, run_code)
        return found, _task_table(found)

    return measure


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


def _text(source: Path, path: Path, plot: Path | None) -> Measure:
    from llada_train.convert.load import describe
    from llada_train.evaluation.text_file import draw, text_ids, text_report

    text_ids(path, describe(source)[1])

    def measure(model: "Loaded", batch_size: int) -> "tuple[TextReport, Table]":
        length = model.max_sequence_length
        with counted_progress("rows", "rows") as advance:
            report = text_report(model.scorer, path, model.tokenizer, length, batch_size, on_progress=advance)
        if plot is not None:
            draw(report, plot)
        return report, _text_table(report)

    return measure


def _text_table(report: "TextReport") -> "Table":
    from rich.table import Table

    left_over = f"; {report.left_over:,} at the end, less than a row, are not measured" if report.left_over else ""
    table = Table(title=f"{report.tokens:,} tokens, {report.text_bytes:,} bytes{left_over}")
    table.add_column("t")
    table.add_column("bits per byte", justify="right")
    for one in report.buckets:
        table.add_row(f"{one.t_from:.1f} – {one.t_to:.1f}", f"{one.bits_per_byte:.3f} ± {one.standard_error:.3f}")
    table.add_row("bound", f"{report.bits_per_byte:.3f} ± {report.standard_error:.3f}")
    return table


def _spans(source: Path, path: Path) -> Measure:
    from llada_train.convert.load import describe
    from llada_train.evaluation.filling import span_accuracy
    from llada_train.evaluation.text_file import text_ids

    ids = text_ids(path, describe(source)[1])

    def measure(model: "Loaded", batch_size: int) -> "tuple[list[Accuracy], Table]":
        length = model.max_sequence_length
        with counted_progress("span lengths", "lengths") as advance:
            found = span_accuracy(model.sampler, ids, model.tokenizer, length, batch_size, on_progress=advance)
        return found, _accuracy_table(found)

    return measure


def _reversal(source: Path, path: Path) -> Measure:
    from llada_train.convert.load import describe
    from llada_train.evaluation.filling import reversal_accuracy

    pairs: list[tuple[str, str]] = []
    for number, row in enumerate(json_lines(path, ("first",)), 1):
        first, second = row["first"], row.get("second")
        if not (isinstance(first, str) and isinstance(second, str) and first and second):
            raise UserError(f"{path}: pair {number}: expected the texts first and second")
        pairs.append((first, second))
    sizes, tokenizer = describe(source)
    for number, pair in enumerate(pairs, 1):
        tokens = sum(len(ids) for ids in tokenizer.encode_batch(pair))
        check_length(tokens, sizes, f"{path}: pair {number}")

    def measure(model: "Loaded", batch_size: int) -> "tuple[list[Accuracy], Table]":
        with counted_progress("directions", "directions") as advance:
            found = reversal_accuracy(model.sampler, pairs, tokenizer, batch_size, advance)
        return found, _accuracy_table(found)

    return measure


def _accuracy_table(found: "list[Accuracy]") -> "Table":
    from rich.table import Table

    table = Table()
    for column in ("", "cases", "exact", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    for one in found:
        table.add_row(one.what, f"{one.cases:,}", f"{one.exact:.3f} ± {one.standard_error:.3f}", f"{one.tokens:.3f}")
    return table


def _held_out(source: Path) -> Measure:
    from llada_train.checkpoint.reader import Checkpoint
    from llada_train.checkpoint.store import resolve
    from llada_train.data.opening import open_data
    from llada_train.data.rows import PretrainingData
    from llada_train.data.sft import SftData
    from llada_train.evaluation.answers import answers_report
    from llada_train.evaluation.report import held_out_report

    with Checkpoint(resolve(source)) as checkpoint:
        config = checkpoint.config

    def measure(model: "Loaded", batch_size: int) -> "tuple[HeldOutReport | AnswersReport, Table]":
        data = open_data(config)
        if isinstance(data, SftData):
            with counted_progress("answers to held-out prompts", "tokens") as advance:
                answers = answers_report(model.sampler, data, batch_size, advance)
            return answers, _answers_table(answers)
        assert isinstance(data, PretrainingData)
        with counted_progress("bound on held-out rows", "rows") as advance:
            report = held_out_report(model.scorer, data, config, batch_size, advance)
        return report, _held_out_table(report)

    return measure


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
