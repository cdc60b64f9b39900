"""The `llada-data` commands that look at a corpus."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from llada_train.data.tokenizer import Tokenizer

app = typer.Typer()

Prefix = Annotated[str, typer.Argument(help="What .bin and .idx are added to; a path or a URL.", show_default=False)]
Prefixes = Annotated[
    str,
    typer.Argument(
        help="What .bin and .idx are added to; a path, a URL (s3://…) or a pattern of files that are one corpus.",
        show_default=False,
    ),
]
OfCorpus = Annotated[Path | None, typer.Option(help="The tokenizer it was made with.", show_default=False)]


@app.command("inspect")
def inspect_command(
    prefix: Prefixes,
    tokenizer: OfCorpus = None,
    samples: Annotated[int, typer.Option(min=1, help="Documents shown, with --tokenizer.")] = 3,
    sample_tokens: Annotated[int, typer.Option(min=1, help="How much of each is shown.")] = 100,
) -> None:
    """Show what is in a corpus: counts, lengths of documents and, with --tokenizer, text."""
    from data_tools.verify import expected, length_histogram
    from data_tools.verify import samples as decoded_samples
    from llada_train.data.corpus import Corpus

    corpus, reader = Corpus(prefix), _load(tokenizer)
    manifest = corpus.manifest
    if reader is not None:
        expected(manifest, reader, prefix)
    print(f"documents  {corpus.num_documents:,}\ntokens     {corpus.num_tokens:,} ({corpus.dtype})")
    if manifest is not None:
        print(f"text bytes {manifest.text_bytes:,}, {manifest.text_bytes / corpus.num_tokens:.2f} per token")
        for reason, count in manifest.rejected.items():
            print(f"left out   {count:,}: {reason}")
    print(f"\n{'tokens up to':>14} {'documents':>14} {'of all':>7} {'tokens':>18} {'of all':>7}")
    for length, documents, tokens in length_histogram(corpus):
        share = documents / corpus.num_documents, tokens / corpus.num_tokens
        print(f"{length:14,} {documents:14,} {share[0]:7.1%} {tokens:18,} {share[1]:7.1%}")
    if reader is not None:
        for number, text in decoded_samples(corpus, reader, samples, sample_tokens):
            shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)  # no commands to the terminal
            print(f"\n— document {number:,} —\n{shown}")


@app.command("verify")
def verify_command(prefix: Prefixes, tokenizer: OfCorpus = None) -> None:
    """Read all of a corpus: structure, ids in range, EOS after each document, checksums.

    Exits with 1 if something is wrong. What ids there are says its manifest, else --tokenizer.
    """
    from data_tools.verify import verify
    from llada_train.data.corpus import Corpus
    from llada_train.data.progress import ByteProgress

    corpus, done = Corpus(prefix), 0
    with ByteProgress(corpus.num_tokens * corpus.dtype.itemsize) as progress:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            progress.update(done)

        faults = list(verify(corpus, _load(tokenizer), advance))
    for fault in faults:
        print(fault)
    if faults:
        raise typer.Exit(1)
    unsure = "" if corpus.manifest else "; there is no manifest, so no checksums to compare"
    print(f"{prefix}: {corpus.num_documents:,} documents with {corpus.num_tokens:,} tokens are sound{unsure}")


@app.command("add-eos")
def add_eos_command(
    prefix: Prefix,
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer it was made with.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Prefix of the new corpus.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Copy a corpus of another tool, with an EOS after each document that lacks it."""
    from data_tools.parts import refuse_existing
    from data_tools.verify import add_eos
    from llada_train.data.corpus import Corpus
    from llada_train.data.progress import ByteProgress
    from llada_train.data.tokenizer import Tokenizer

    if output.absolute() == Path(prefix).absolute():
        raise UserError(f"{output}: is the corpus that is read; give another --output")
    if not overwrite:
        refuse_existing(output)
    corpus, done = Corpus(prefix), 0
    with ByteProgress(corpus.num_tokens * corpus.dtype.itemsize) as progress:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            progress.update(done)

        added = add_eos(prefix, output, Tokenizer.load(tokenizer), advance)
    print(f"{output}: {added:,} of {corpus.num_documents:,} documents were given an EOS")


def _load(tokenizer: Path | None) -> "Tokenizer | None":
    from llada_train.data.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer) if tokenizer else None
