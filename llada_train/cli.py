"""The `llada-train` command. Nothing heavy is imported before a command needs it."""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llada_train.cluster import commands as cluster
from llada_train.commands import evaluate, sample, train
from llada_train.config.errors import UserError
from llada_train.plan.command import plan

USER_ERROR_EXIT_CODE = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pre-train masked diffusion language models (LLaDA) with megatron-core and DeepSpeed.",
)
convert = typer.Typer(no_args_is_help=True, help="Convert checkpoints to and from Hugging Face folders.")
app.add_typer(convert, name="convert")
checkpoint = typer.Typer(no_args_is_help=True, help="List, verify and thin out the checkpoints of a run.")
app.add_typer(checkpoint, name="checkpoint")
for command in (
    train.pretrain,
    train.sft,
    plan,
    sample.sample,
    evaluate.evaluate,
    cluster.submit,
    cluster.status,
    cluster.doctor,
):
    app.command()(command)
app.add_typer(cluster.array, name="array")
app.add_typer(cluster.job, name="job")


class Precision(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


@convert.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its newest) or a step-*.")],
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    dtype: Annotated[Precision, typer.Option(help="Of the weights written.")] = Precision.bf16,
) -> None:
    """Write a checkpoint, of any layout, as a Hugging Face folder that transformers loads by itself.

    Example: llada-train convert to-hf runs/demo/train hf
    """
    from llada_train.checkpoint.store import resolve

    resolve(source)  # before the slow imports
    from llada_train.checkpoint.reader import Checkpoint, open_verified
    from llada_train.convert.to_hf import check_export
    from llada_train.convert.to_hf import to_hf as write

    def check(weights: Checkpoint) -> None:
        check_export(weights, output, dtype.value)

    started = time.monotonic()
    with _bytes_progress() as of, open_verified(source, of("comparing checksums"), check) as weights:
        write(weights, output, dtype.value, of("writing"))
    typer.echo(f"wrote {output} in {time.monotonic() - started:,.0f} s")


@convert.command("from-hf")
def from_hf(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A LLaDA in Hugging Face format: a local folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
) -> None:
    """Take a LLaDA folder, released or exported, as a checkpoint to begin runs from. Its code is never run.

    Names, shapes, dtypes, config and tokenizer are compared first, and all that does not fit is told at once.

    Example: llada-train convert from-hf LLaDA-8B-Base base; then pretrain with init_from=base model=base/model.yaml
    """
    from llada_train.convert.from_hf import from_hf as write
    from llada_train.model.sizes import parameter_count

    started = time.monotonic()
    with _bytes_progress() as of:
        model = write(source, output, of("writing"))
    typer.echo(
        f"wrote {output} in {time.monotonic() - started:,.0f} s: {parameter_count(model):,} parameters; begin a run "
        f"from it with init_from={output} model={output / 'model.yaml'}"
    )


@checkpoint.command("list")
def list_checkpoints(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """The checkpoints of a run, oldest first. Files are looked for and their sizes compared, not their checksums."""
    from llada_train.checkpoint.inventory import summaries

    found = summaries(run)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=2, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("checkpoint", "step", "tokens", "saved", "MB", "layout", ""):
        right = column in ("step", "tokens", "MB")
        table.add_column(column, justify="right" if right else "left", no_wrap=bool(column))
    for one in found:
        numbers = [f"{n:,}" if n is not None else "" for n in (one.step, one.tokens)]
        saved = one.saved.astimezone().strftime("%Y-%m-%d %H:%M") if one.saved else ""
        size = f"{one.bytes / 1e6:,.1f}" if one.bytes is not None else ""
        remark = "DAMAGED: " + escape(one.problem) if one.problem else "latest" if one.latest else ""
        table.add_row(one.name, *numbers, saved, size, one.layout or "", remark)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a pipe has no width to fit


@checkpoint.command()
def verify(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (all of its) or a step-*.")],
) -> None:
    """Compare every file with its checksum, checkpoint by checkpoint; exit code 1 if any is damaged."""
    from llada_train.checkpoint.inventory import damage, folders_of

    any_damaged = False
    for folder in folders_of(source):
        with _progress(folder.name) as advance:
            problem = damage(folder, advance)
        typer.echo(f"{folder}: sound" if problem is None else str(problem))
        any_damaged |= problem is not None
    raise typer.Exit(int(any_damaged))


@checkpoint.command()
def prune(
    run: Annotated[Path, typer.Argument(help="A run folder in which no run is at work.")],
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay.")],
    keep_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Checkpoints of steps that are a multiple of this stay as well.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove old checkpoints. The newest sound one always stays; damaged ones are left as they are."""
    from llada_train.checkpoint.inventory import folders_of, remove, size_of, to_prune
    from llada_train.training.run_folder import lock

    folders_of(run)  # before a lock is put into any folder
    with lock(run):
        with _progress("verifying what stays") as advance:
            folders = to_prune(run, keep, keep_every_steps, advance)
        freed = 0
        for folder in folders:
            size = size_of(folder)
            if not dry_run:
                remove(folder)
            freed += size
            typer.echo(f"{'would remove' if dry_run else 'removed'} {folder}: {size / 1e6:,.1f} MB")
    count = "1 checkpoint" if len(folders) == 1 else f"{len(folders)} checkpoints"
    typer.echo(f"{count}, {freed / 1e6:,.1f} MB {'to be ' if dry_run else ''}freed")


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal; yields the function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _bytes_progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress bars with rate and time left on stderr, where that is a terminal.

    Yields what makes a bar for a label: the function to call with (bytes done, bytes in all).
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:

        def of(label: str) -> Callable[[int, int], None]:
            task = bar.add_task(label, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield of


def main() -> None:
    """Run the command; a user's mistake is one message on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        _tell(error)
        sys.exit(USER_ERROR_EXIT_CODE)


def _tell(error: UserError) -> None:
    if os.environ.get("RANK", "0") != "0":
        # What every rank sees, rank 0 tells, and the launcher ends the others; left is what is this rank's own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        print(f"error (rank {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)
        return
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
