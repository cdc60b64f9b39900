"""`llada-data`: from text to a tokenizer and a tokenized corpus. Heavy imports wait until a command runs."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_tools import corpus_cli
from data_tools.cleaning import cli as cleaning
from data_tools.options import Inputs, Overwrite, TextKey, Workers, printable, report_rejected, warn
from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from data_tools.tokenize import Shard
    from data_tools.trace import TracedSample
    from llada_train.data.corpus import Manifest
    from llada_train.data.training_data import TrainingData

app = typer.Typer(
    name="llada-data",
    help="Prepare text for llada-train: clean it, train a tokenizer, tokenize it into a corpus, look at it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(corpus_cli.app)

TokenizerPath = Annotated[Path, typer.Option(help="Tokenizer folder, or sentencepiece .model.", show_default=False)]
Kind = Literal["byte-level-bpe", "sentencepiece-bpe", "sentencepiece-unigram"]


@app.command("train-tokenizer")
def train_tokenizer_command(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, special tokens included.", show_default=False)],
    kind: Annotated[
        Kind, typer.Option(help="transformers' AutoTokenizer reads byte-level BPE only.")
    ] = "byte-level-bpe",
    text_key: TextKey = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a tokenizer with LLaDA's special tokens: mask, begin and end of text, and those of chat."""
    from data_tools.sources import Sources
    from data_tools.train_tokenizer import Kind as TokenizerKind
    from data_tools.train_tokenizer import train_tokenizer
    from llada_train.data.progress import ByteProgress

    _refuse_tokenizer(output, overwrite)
    sources = Sources(inputs, text_key)
    with ByteProgress(sources.total_bytes) as progress:

        def texts() -> Iterator[str]:
            for document in sources:
                progress.update(sources.bytes_read)
                yield document.text

        tokenizer = train_tokenizer(texts(), vocab_size, output, TokenizerKind(kind))
    report_rejected(sources)
    print(f"{output}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < vocab_size:
        warn(f"the text has pairs for {tokenizer.vocab_size:,} tokens only, not for {vocab_size:,}")


@app.command("add-mask-token")
def add_mask_token_command(
    tokenizer: Annotated[Path, typer.Argument(help="Tokenizer folder, or sentencepiece .model.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Give a tokenizer the mask token, and the end-of-text token, if it lacks them. No other id changes."""
    from data_tools.train_tokenizer import add_special_tokens
    from llada_train.data.tokenizer import Tokenizer

    _refuse_tokenizer(output, overwrite)
    added = add_special_tokens(tokenizer, output)
    loaded = Tokenizer.load(output)
    print(f"{output}: {loaded.vocab_size:,} tokens; mask {loaded.mask_id}, EOS {loaded.eos_id}; ", end="")
    print(f"added {' and '.join(added)}" if added else "it had both already")


def _refuse_tokenizer(folder: Path, overwrite: bool) -> None:
    from llada_train.data.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILE

    if not overwrite and any((folder / name).exists() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        raise UserError(f"{folder}: a tokenizer is already there; give another --output, or --overwrite to replace it")


@app.command("tokenize")
def tokenize_command(
    inputs: Inputs,
    tokenizer: TokenizerPath,
    output: Annotated[Path, typer.Option(help="Prefix: .bin, .idx and .json are added.", show_default=False)],
    text_key: TextKey = "text",
    workers: Workers = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do only share I, from 0, of N, as a task of a SLURM array; `llada-data merge` joins them. Machines "
            "that share no disk need the input under the same path, with the same times of modification (`rsync -a`).",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize text into a corpus in Megatron's format, with an EOS after each document.

    The same command goes on where an interrupted one was.
    """
    from data_tools.sources import Sources
    from data_tools.tokenize import tokenize
    from llada_train.data.progress import ByteProgress

    sources = Sources(inputs, text_key)
    share = _shard(shard)
    with ByteProgress(sources.total_bytes if share is None else sources.total_bytes // share.count) as progress:
        manifest = tokenize(sources, tokenizer, output, workers, overwrite, progress.update_tokens, _note, share)
    report_rejected(sources)
    if manifest is None:
        print(f"{output}.parts: share {shard} is finished; when all are: llada-data merge {output}")
    else:
        _print_manifest(manifest, output)


@app.command("merge")
def merge_command(
    prefix: Annotated[Path, typer.Argument(help="The --output of `llada-data tokenize --shard`.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Join the shares of `tokenize --shard` into one corpus, the same as without shares.

    They lie in PREFIX.parts. Machines that share no disk each have one: copy all files into one folder of that name.
    They fit together if the input had the same path and the same times of modification everywhere (`rsync -a`).
    """
    from data_tools.parts import Parts, refuse_existing

    if not overwrite:
        refuse_existing(prefix)
    with Parts.resume(prefix) as parts:
        _print_manifest(parts.merge(), prefix)


def _shard(text: str | None) -> "Shard | None":
    from data_tools.tokenize import Shard

    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard {text}: expected I/N, with I from 0 to N - 1; for example 0/8 to 7/8")
    return Shard(int(found[1]), int(found[2]))


def _print_manifest(manifest: "Manifest", prefix: Path) -> None:
    from llada_train.data.corpus import corpus_files

    rows = {
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,}",
        "text bytes": f"{manifest.text_bytes:,}",
        "bytes per token": f"{manifest.text_bytes / manifest.tokens:.2f}",
        "files": ", ".join(map(str, corpus_files(prefix))),
    }
    for name, value in rows.items():
        print(f"{name:15}  {value}")


def _note(line: str) -> None:
    typer.echo(line, err=True)


@app.command("trace")
def trace_command(
    config: Annotated[Path, typer.Argument(help="The run's YAML config.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, by dotted key.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Show what this step reads.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only what this rank reads; needs --processes.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many processes the run has.")] = None,
    find: Annotated[
        str | None, typer.Option(help="Show which steps use documents that hold this text.", metavar="TEXT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, texts whole.")] = False,
) -> None:
    """Which text a step of a run uses (--step), or which steps use a text (--find); nothing is run.

    If the run folder has a checkpoint, what that recorded of the run so far is followed.
    """
    from data_tools.trace import find as find_uses
    from data_tools.trace import open_run, place, trace
    from llada_train.data.progress import ByteProgress

    if (step is None) == (find is None) or find == "":
        raise UserError("trace: give either --step N or --find TEXT")
    if (rank is None) != (processes is None) or (rank is not None and step is None):
        raise UserError("trace: --rank and --processes say together whose rows of --step are shown")
    settings, data = open_run(config, overrides or [], processes)
    if step is not None:
        rows = trace(settings, data, step, place(settings, rank, processes))
        if as_json:
            _print_json(rows)
        else:
            _print_samples(step, data, list(rows))
        return
    found, size = 0, max(corpus.dtype.itemsize for corpus in data.corpora)
    with ByteProgress(size * sum(corpus.num_tokens for corpus in data.corpora)) as progress:
        for use in find_uses(settings, data, str(find), lambda tokens: progress.update(size * tokens)):
            found += 1
            if as_json:
                _print_json([use])
                continue
            steps = ", ".join(f"{number:,}" for number in use.steps) or "none"
            print(
                f"{use.corpus}, document {use.document:,} ({use.tokens:,} tokens): "
                + ("held out, never trained on" if use.held_out else f"steps {steps}"),
                flush=True,
            )
    if not found:
        print(f"no document of {len(data.corpora)} corpora holds {find!r}", file=sys.stderr)
        raise typer.Exit(1)


def _print_json(records: "Iterable[DataclassInstance]") -> None:
    for record in records:
        print(json.dumps(dataclasses.asdict(record), ensure_ascii=False), flush=True)


def _print_samples(step: int, data: "TrainingData", rows: "Sequence[TracedSample]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = data.timeline.first_sample(step)
    phase = data.timeline.phase(first)
    table = Table(
        title=f"step {step:,}: {len(rows):,} of {phase.global_batch_size:,} samples of at most "
        f"{phase.sequence_length:,} tokens, from {data.timeline.tokens(first):,} nominal tokens on"
    )
    for column in ("row", "sample", "corpus", "epoch", "documents", "tokens", "t", "masked", "text"):
        right = column in ("row", "sample", "epoch", "tokens", "t", "masked")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        numbers = [part.number for part in row.documents]
        documents = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,}–{numbers[-1]:,}"
        table.add_row(
            f"{row.row:,}",
            f"{row.sample:,}",
            escape(row.corpus),
            f"{row.epoch}",
            documents,
            f"{row.length:,}",
            f"{row.t:.4f}",
            f"{row.masked:,}",
            escape(printable(row.text[:48])) + ("…" if len(row.text) > 48 else ""),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)


cleaning.register(app)


def main() -> None:
    """Entry point: exit code 2 and one message for what the user can mend."""
    try:
        app()
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
