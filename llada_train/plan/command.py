"""`llada-train plan`: tables for people, JSON for programs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from llada_train.config.schema import Config
    from llada_train.plan.plan import Machine, Plan
    from llada_train.plan.search import Found

SHOWN = 12  # layouts of --search


def plan(
    config: Annotated[Path, typer.Argument(help="YAML config file, for example configs/pretrain/llada_8b.yaml.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train.", show_default=False)],
    gpu: Annotated[str, typer.Option(help="What is in them: h800, h100, h200, a100, …", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, by dotted key.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Rank all layouts that fit; what is given as KEY=VALUE stays.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    mfu: Annotated[
        float | None, typer.Option(help="Of a run that was measured, such as 0.4; estimated if left out.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", help="The site's facts, which say how many GPUs a node has; 8 if left out."),
    ] = None,
    write_rate: Annotated[
        float, typer.Option(min=0.001, help="GB/s at which all nodes together write a checkpoint.")
    ] = 10.0,
    examples: Annotated[
        int | None, typer.Option(min=1, help="SFT: training examples, where the data sets are not here to be counted.")
    ] = None,
) -> None:
    """What a run would need, before there is any data or GPU: memory by cause, time, traffic; does it fit?

    All by arithmetic from the config and the GPU's data sheet. Exit code 1: it does not fit. The rows of an SFT run are
    taken to be as long as data.sequence_length, the most they are, and to hold one example each: what packing saves
    hangs on the lengths of the examples, and the run tells it when it begins.

    Example: llada-train plan configs/pretrain/llada_8b.yaml --nodes 40 --gpu h800 --search
    """
    from llada_train.plan.chips import chip_called
    from llada_train.plan.plan import Machine, make_plan
    from llada_train.plan.plan import as_json as plan_as_json
    from llada_train.plan.search import search as find

    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: is a share of the peak, more than 0 and at most 1; for example 0.4")
    machine = Machine(gpu.upper(), chip_called(gpu), nodes, _gpus_per_node(cluster))
    if search:
        # The layout is what is looked for: the file's own need not divide these GPUs.
        keep = {text.partition("=")[0] for text in overrides or []}
        found = find(_checked(config, overrides or [], examples), machine, mfu, write_rate * 1e9, keep)
        if as_json:
            best = [plan_as_json(one) for one in found.best]
            typer.echo(json.dumps({"layouts": found.layouts, "fitting": len(found.fitting), "best": best}, indent=2))
        else:
            _print_search(found, machine)
        raise typer.Exit(int(not found.fitting))
    checked = _checked(config, overrides or [], examples, machine.gpus)
    one = make_plan(checked, machine, mfu, write_rate * 1e9)
    if as_json:
        typer.echo(json.dumps(plan_as_json(one), indent=2))
    else:
        others = find(checked, machine, mfu, write_rate * 1e9).best if not one.fits else []
        _print_plan(one, others)
    raise typer.Exit(int(not one.fits))


def _checked(file: Path, overrides: list[str], examples: int | None, world_size: int | None = None) -> "Config":
    """The config with its learning-rate phases in tokens."""
    from llada_train.config.load import load_config
    from llada_train.data.opening import open_data
    from llada_train.data.sft import phases_in_tokens

    config = load_config(file, overrides, world_size)
    if config.sft is None:
        if examples is not None:
            raise UserError("--examples: is for SFT, whose length may be in epochs; leave it out")
        return config
    if examples is not None:
        return phases_in_tokens(config, examples)
    try:
        return open_data(config).config
    except UserError as error:
        raise UserError(f"{error}; or give --examples, to plan without the data") from None


def _gpus_per_node(cluster: Path | None) -> int:
    from llada_train.config.cluster import ClusterConfig
    from llada_train.config.load import load
    from llada_train.plan.chips import GPUS_PER_NODE

    if cluster is None:
        return GPUS_PER_NODE
    gpus = load(ClusterConfig, cluster).node.gpus
    if not gpus:
        raise UserError(f"{cluster}: node.gpus is 0, and a plan is for GPUs; leave --cluster out, or give nodes some")
    return gpus


def _print_plan(one: "Plan", others: "list[Plan]") -> None:
    from rich.console import Console
    from rich.table import Table

    from llada_train.plan.tables import changes, layout_name, memory_rows, run_rows, traffic_rows

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"[bold]{layout_name(one)}[/], predicted by arithmetic")
    memory = Table(title=f"GB of the fullest GPU{_of_rank(one)}", title_justify="left")
    for column in ("", "GB", ""):
        memory.add_column(column, justify="right" if column else "left")
    for cause in memory_rows(one):
        memory.add_row(*cause)
    console.print(memory)
    grid = Table.grid(padding=(0, 2))
    for name, value in run_rows(one):
        grid.add_row(f"[bold]{name}", value)
    console.print(grid)
    rows = traffic_rows(one)
    if rows:
        sent = Table(title="sent by each GPU in a step", title_justify="left")
        for column in ("parallelism", "what", "operation", "GB", "seconds", "behind"):
            sent.add_column(column, justify="right" if column in ("GB", "seconds") else "left")
        for row in rows:
            sent.add_row(*row)
        console.print(sent)
    if one.fits:
        return
    if not others:
        console.print("[yellow]No layout of so many of these GPUs fits: take more nodes or larger GPUs.")
    for other in others[:3]:
        console.print(f"[yellow]fits, {other.main.step.total:.2f} s per step:[/] {changes(one, other)}")


def _of_rank(one: "Plan") -> str:
    return f": pipeline rank {one.fullest}" if len(one.memory) > 1 else ""


def _print_search(found: "Found", machine: "Machine") -> None:
    from rich.console import Console
    from rich.table import Table

    from llada_train.plan.tables import SEARCH_COLUMNS, search_row

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if not found.layouts:
        console.print(
            f"[yellow]No layout divides the global batch and the model among {machine.gpus} GPUs: take another number "
            "of nodes, or another training.global_batch_size."
        )
        return
    title = (
        f"{machine.nodes} × {machine.gpus_per_node} {machine.chip_name}: {len(found.fitting):,} of {found.layouts:,} "
        "layouts fit; the quickest of each TP, PP, CP and ZeRO stage\nTimes are estimated: a difference of less than a "
        "tenth says little"
    )
    table = Table(title=title, title_justify="left")
    for column in SEARCH_COLUMNS:
        table.add_column(column, justify="right")
    for one in found.best[:SHOWN]:
        table.add_row(*search_row(one))
    console.print(table)
