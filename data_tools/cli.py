"""`llada-data`: from text to a tokenizer and a tokenized corpus. Heavy imports wait until a command runs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cleaning import cli as cleaning
from data_tools.options import Inputs, Overwrite, TextKey, Workers, report_rejected, warn
from llada_train.config.errors import UserError

app = typer.Typer(
    name="llada-data",
    help="Prepare text for llada-train: clean it, train a tokenizer, tokenize it into a corpus.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("train-tokenizer")
def train_tokenizer_command(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, special tokens included.", show_default=False)],
    text_key: TextKey = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer with LLaDA's special tokens.

    The folder can be read by llada-data, llada-train and transformers' AutoTokenizer.
    """
    from data_tools.progress import ByteProgress
    from data_tools.sources import Sources
    from llada_train.data.tokenizer import TOKENIZER_FILE, train_tokenizer

    if (output / TOKENIZER_FILE).exists() and not overwrite:
        raise UserError(f"{output}: a tokenizer is already there; give another --output, or --overwrite to replace it")
    sources = Sources(inputs, text_key)
    with ByteProgress(sources.total_bytes) as progress:

        def texts() -> Iterator[str]:
            for document in sources:
                progress.update(sources.bytes_read)
                yield document.text

        tokenizer = train_tokenizer(texts(), vocab_size, output)
    report_rejected(sources)
    print(f"{output}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < vocab_size:
        warn(f"the text has pairs for {tokenizer.vocab_size:,} tokens only, not for {vocab_size:,}")


@app.command("tokenize")
def tokenize_command(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Prefix: .bin, .idx and .json are added.", show_default=False)],
    text_key: TextKey = "text",
    workers: Workers = 1,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize text into a corpus in Megatron's format, with an EOS after each document."""
    from data_tools.progress import ByteProgress
    from data_tools.sources import Sources
    from data_tools.tokenize import tokenize
    from llada_train.data.corpus import corpus_files

    sources = Sources(inputs, text_key)
    with ByteProgress(sources.total_bytes) as progress:

        def report(documents: int, tokens: int) -> None:
            progress.update(sources.bytes_read, f"{documents:,} documents, {tokens:,} tokens")

        manifest = tokenize(sources, tokenizer, output, workers, overwrite, report)
    report_rejected(sources)
    rows = {
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,}",
        "text bytes": f"{manifest.text_bytes:,}",
        "bytes per token": f"{manifest.text_bytes / manifest.tokens:.2f}",
        "files": ", ".join(map(str, corpus_files(output))),
    }
    for name, value in rows.items():
        print(f"{name:15}  {value}")


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
