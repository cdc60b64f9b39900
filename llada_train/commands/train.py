"""The commands that train: pretrain and sft. Nothing heavy is imported before a command needs it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from llada_train.training.preflight import Inputs

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, by dotted key.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Start so many processes on this machine (torchrun works as well).")
]
AcceptConfigChanges = Annotated[
    bool, typer.Option("--accept-config-changes", help="Go on with settings that the run was not begun with.")
]


def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML config file, for example configs/pretrain/demo.yaml.")],
    overrides: Overrides = None,
    processes: Processes = None,
    accept_config_changes: AcceptConfigChanges = False,
) -> None:
    """Pre-train a model; run the same command again to go on after a stop.

    Alone, under torchrun, by submit, or with --processes N. SIGTERM, SIGUSR1 or Ctrl-C ends it after the step in hand,
    with a checkpoint and exit code 75; a finished run exits with 0, a mistake in config, data or environment with 2,
    one that hangs (training.hang_timeout_seconds) with 70.

    Example: llada-train pretrain configs/pretrain/demo.yaml training.micro_batch_size=4 --processes 2
    """
    _train("pretrain", config, overrides or [], processes, accept_config_changes)


def sft(
    config: Annotated[Path, typer.Argument(help="YAML config file, for example configs/sft/llada_8b.yaml.")],
    overrides: Overrides = None,
    processes: Processes = None,
    accept_config_changes: AcceptConfigChanges = False,
) -> None:
    """Fine-tune a model on dialogues, starting from init_from: everything else is as in pretrain.

    Data sets are JSON lines, JSON, parquet or arrow, in the usual shapes; what they were taken for is shown first.

    Example: llada-train sft configs/sft/llada_8b.yaml init_from=LLaDA-8B-Base data.corpora.0.path=pairs.jsonl
    """
    _train("sft", config, overrides or [], processes, accept_config_changes)


def _train(kind: str, config: Path, overrides: list[str], processes: int | None, accept_config_changes: bool) -> None:
    if processes is not None:
        from llada_train.parallel.launch import launch_local, own_command
        from llada_train.training.preflight import check_content

        # Every problem is told once, before anything starts.
        inputs = _open_inputs(kind, config, overrides, processes, accept_config_changes)
        check_content(inputs)
        inputs.run.prepare()
        inputs.run.release()  # to the first of the processes
        flags = ["--accept-config-changes"] if accept_config_changes else []
        raise typer.Exit(launch_local(processes, own_command([kind, str(config), *overrides, *flags])))
    from llada_train.training.signals import StopRequest

    stop = StopRequest()
    from llada_train.parallel.launch import adopt_place, world_size
    from llada_train.training.journal import StartTimes

    start = StartTimes.of_this_process()
    adopt_place()
    # A mistake is told before the slow imports.
    inputs = _open_inputs(kind, config, overrides, world_size(), accept_config_changes)
    from llada_train.parallel.topology import quiet_engines

    quiet_engines()
    from llada_train.training.watchdog import Watchdog

    with Watchdog(inputs.config.training.hang_timeout_seconds, int(os.environ.get("RANK", "0"))) as watchdog:
        from llada_train.training.pretrain import pretrain as run

        raise typer.Exit(run(inputs, stop, watchdog, start))


def _open_inputs(
    kind: str, config: Path, overrides: list[str], processes: int, accept_config_changes: bool
) -> "Inputs":
    from llada_train.config.load import load_config
    from llada_train.training.initial import check_initial_weights
    from llada_train.training.preflight import open_inputs

    settings = load_config(config, overrides, processes)
    if kind != settings.command:
        if settings.sft is None:
            raise UserError(f"{config}: has no section sft; add `sft: {{}}`, or run it with `llada-train pretrain`")
        raise UserError(f"{config}: has a section sft; run it with `llada-train sft`")
    check_initial_weights(settings)
    return open_inputs(settings, accept_config_changes)
