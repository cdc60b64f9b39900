"""`llada-train evaluate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from llada_train.commands.console import counted_progress
from llada_train.commands.inputs import write_whole


def evaluate(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its newest) or a step-*.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON to this file instead.")] = None,
) -> None:
    """Bound on the held-out documents, against unigram and bigram models of the same tokens; on a GPU (bf16) or CPU."""
    import torch

    from llada_train.checkpoint.reader import open_verified
    from llada_train.convert.plain import plain_model
    from llada_train.data.rows import PretrainingData
    from llada_train.evaluation.report import held_out_report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open_verified(source) as weights:
        config = weights.config
        plain = plain_model(weights, config.model, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    data = PretrainingData(config)
    with counted_progress("bound on held-out rows", "rows") as advance:
        report = held_out_report(lambda ids: plain(ids.to(device)).logits, data, config, advance)
    text = json.dumps(dataclasses.asdict(report), indent=2)
    if output is not None:
        write_whole(output, f"{text}\n")
        return
    if as_json:
        typer.echo(text)
        return
    from rich.console import Console
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
    Console().print(table)
