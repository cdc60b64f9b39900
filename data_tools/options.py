"""What the commands of `llada-data` have in common on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data_tools.sources import Sources

Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="INPUT...",
        help="Files, folders and patterns. .jsonl and .ndjson, also .gz and .zst, hold one document per line, and so "
        "do .json.gz and .json.zst; .parquet and .arrow hold one per row. Any other file is one document, .json too. "
        "Folders are read with all folders in them, hidden files left out.",
        show_default=False,
    ),
]
TextKey = Annotated[str, typer.Option(help="The key of the text in JSON lines, or its column.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes. The output is the same for any number.")]


def report_rejected(sources: "Sources") -> None:
    for reason, count in sources.rejected.items():
        warn(f"left out, {reason}: {count:,}, the first in {sources.first_rejected[reason]}")


def printable(text: str) -> str:
    """In one line, and without what would steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def warn(message: str) -> None:
    typer.secho(f"warning: {message}", fg="yellow", err=True)
