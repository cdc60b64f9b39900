"""The `llada-train` command. Nothing heavy is imported before a command needs it."""

import json
import os
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llada_train.config.errors import UserError

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


class Remasking(StrEnum):
    low_confidence = "low_confidence"
    random = "random"


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML config file, for example configs/pretrain/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, by dotted key.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Start so many processes on this machine (torchrun works as well).")
    ] = None,
) -> None:
    """Pre-train a model; run the same command again to go on after a stop.

    Alone, under torchrun, or with --processes N. SIGTERM or SIGUSR1 ends the run after the step in hand with a
    checkpoint and exit code 75; a finished run exits with 0, a mistake in config, data or environment with 2.

    Example: llada-train pretrain configs/pretrain/demo.yaml training.micro_batch_size=4 --processes 2
    """
    if processes is not None:
        from llada_train.config.load import load_config
        from llada_train.parallel.launch import launch_local, own_command

        load_config(config, overrides or [], processes)  # every problem is told once, before anything starts
        raise typer.Exit(launch_local(processes, own_command(["pretrain", str(config), *(overrides or [])])))
    from llada_train.parallel.topology import quiet_engines

    quiet_engines()
    from llada_train.training.pretrain import pretrain as run

    raise typer.Exit(run(config, overrides or []))


@convert.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its newest) or a step-*.")],
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="bf16 (as LLaDA's release) or fp32.")] = "bf16",
) -> None:
    """Write a checkpoint, of any layout, as a Hugging Face folder that transformers loads by itself."""
    from llada_train.checkpoint.reader import Checkpoint
    from llada_train.checkpoint.store import resolve
    from llada_train.convert.to_hf import to_hf as write

    with Checkpoint(resolve(source)) as checkpoint:
        write(checkpoint, checkpoint.config, output, dtype)
    typer.echo(f"wrote {output}")


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, a run folder or a checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    infill: Annotated[
        str | None, typer.Option(help="Text with <|mdm_mask|> wherever a token is to be filled in.")
    ] = None,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to generate after a prompt.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; as many as masks if left out.")] = None,
    block_length: Annotated[
        int | None, typer.Option(min=1, help="Fill blocks of so many tokens from left to right; one block if left out.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    remasking: Annotated[
        Remasking, typer.Option(help="Which positions are kept at each step.")
    ] = Remasking.low_confidence,
    seed: Annotated[int, typer.Option(help="Of the temperature's noise and of random remasking.")] = 0,
) -> None:
    """Fill in masks: continue a prompt, or complete a text with masks anywhere."""
    raise NotImplementedError


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its newest) or a step-*.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bound on the held-out documents, against unigram and bigram models of the same tokens."""
    raise NotImplementedError


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
        time.sleep(3)
        print(f"error (rank {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)
        return
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
