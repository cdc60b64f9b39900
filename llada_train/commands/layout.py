"""`--processes`, `--tensor-parallel`, `--pipeline-parallel` of the commands around a model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from llada_train.config.schema import ModelConfig, ParallelConfig

Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Start so many on this machine, one for each GPU (torchrun works as well)."),
]
TensorParallel = Annotated[int, typer.Option(min=1, help="Processes that share each layer.")]
PipelineParallel = Annotated[
    int, typer.Option(min=1, help="Processes that share the layers; copies of the model on the others share the rows.")
]


def checked_layout(
    model: "ModelConfig", processes: int | None, tensor_parallel: int, pipeline_parallel: int
) -> "ParallelConfig":
    """
    Raises:
        UserError: the model cannot be split so, or not over so many processes.
    """
    from llada_train.config.rules import check_processes, layout_problems
    from llada_train.config.schema import ParallelConfig
    from llada_train.parallel.launch import adopt_place, world_size

    adopt_place()
    parallel = ParallelConfig(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    if problem := check_processes(parallel, processes or world_size()):
        raise UserError(problem)
    if problems := layout_problems(model, parallel):
        key, message = problems[0]
        raise UserError(f"--{key.removeprefix('parallel.').replace('_', '-')}: {message}")
    return parallel


def start_processes(context: typer.Context, processes: int | None) -> None:
    """With --processes N, run this command on N of them and end with their exit code."""
    if processes is None:
        return
    from llada_train.parallel.launch import launch_local, own_command

    raise typer.Exit(launch_local(processes, own_command(_arguments(context, leave_out="processes"))))


def _arguments(context: typer.Context, leave_out: str) -> list[str]:
    """What was given to the command, with its name."""
    assert context.info_name is not None
    options, arguments = [context.info_name], list[str]()
    for parameter in context.command.params:
        value: Any = context.params.get(parameter.name or "")
        if parameter.name == leave_out or value is None or value is False:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            arguments += map(str, values)
        elif value is True:
            options.append(parameter.opts[0])
        else:
            options += [f"{parameter.opts[0]}={getattr(one, 'value', one)}" for one in values]
    return [*options, "--", *arguments]
