"""From a site's facts and sizes to the text of an sbatch file, by the templates in launch/."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llada_train.config.cluster import ClusterConfig, EnvironmentConfig
from llada_train.config.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch"
MODULE = ("-m", "llada_train.cli")
PART = "$part"  # of an array, in a command: one line of FOLDER/parts


@dataclass(frozen=True)
class Staged:
    source: Path
    name: str  # under the node's scratch folder: another for each version of the source


def pretrain_script(
    cluster: ClusterConfig, folder: Path, run_dir: Path, nodes: int, requeue: bool, flags: Sequence[str] = ()
) -> str:
    """The job that trains on `nodes`; `folder` is that of the submission, with config.yaml and cluster.yaml.

    Raises:
        UserError: the environment, or the archive to stage, is not there.
    """
    environment = cluster.environment
    source = _source(environment)
    staged = _staged(environment, source) if environment.stage else None
    in_place = shlex.join(_program(environment, str(source), cluster.node.gpus > 0))
    on_local_disk = _with_variable(_program(environment, "$staged", cluster.node.gpus > 0), "$staged")
    return _render(
        "pretrain.sbatch.j2",
        cluster,
        job_name=_job_name(run_dir),
        folder=folder,
        run_dir=run_dir.absolute(),
        nodes=nodes,
        requeue=requeue,
        flags=flags,
        program=in_place,
        staged=staged,
        training_program=on_local_disk if staged else in_place,
        staged_container='--container-image="$staged"' if staged and environment.kind == "pyxis" else "",
        health_minutes=math.ceil(cluster.health.timeout_seconds / 60) + 1,
    )


def array_script(cluster: ClusterConfig, folder: Path, name: str, tasks: int, command: Sequence[str]) -> str:
    """The array of `tasks` jobs of one task each; PART in the command's words is a job's line of FOLDER/parts."""
    words = _with_variable(command, PART)
    return _render("array.sbatch.j2", cluster, job_name=name, folder=folder, tasks=tasks, command=words)


def _with_variable(words: Sequence[str], variable: str) -> str:
    """The words, quoted for a shell, which puts in the variable, at the begin or end of a word, and nothing else."""
    quoted = []
    for word in words:
        before, found, after = word.partition(variable)
        quoted.append(
            f'{shlex.quote(before) if before else ""}"{variable}"{shlex.quote(after) if after else ""}'
            if found
            else shlex.quote(word)
        )
    return " ".join(quoted)


def module_command(cluster: ClusterConfig, module: str) -> list[str]:
    """`python -m module` in the site's environment, for a job's own script."""
    program = _program(cluster.environment, str(_source(cluster.environment)), gpus=False)
    return [module if word == MODULE[1] else word for word in program]


def _render(template: str, cluster: ClusterConfig, **values: Any) -> str:
    if not LAUNCH.is_dir():
        raise UserError(
            f"{LAUNCH}: no such folder; submit from a checkout of llada_train, which has the SLURM templates"
        )
    jinja = Environment(
        loader=FileSystemLoader(LAUNCH),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is a shell script; every value passes through `word`
    )
    jinja.filters["word"] = lambda value: shlex.quote(str(value))
    jinja.filters["option"] = _option
    jinja.filters["words"] = lambda values: shlex.join(map(str, values))
    jinja.filters["pattern"] = lambda value: str(value).replace("%", "%%")  # % means something in SLURM's file names
    site = {name: getattr(cluster, name) for name in type(cluster).model_fields}
    container = _container(cluster.environment)
    return jinja.get_template(template).render(
        **site, container=container, directory=Path.cwd(), launch=LAUNCH, **values
    )


def _option(value: object) -> str:
    """A word of an #SBATCH line, where SLURM knows fewer quotes than a shell.

    Raises:
        UserError: it cannot be written there.
    """
    if any(sign in str(value) for sign in "'\"\\"):
        raise UserError(f"{value}: SLURM takes no path with quotes or backslashes; choose another one")
    return shlex.quote(str(value))


def _source(environment: EnvironmentConfig) -> Path:
    """The environment's own path.

    Raises:
        UserError: it is not there.
    """
    path = environment.path if environment.path is not None else Path(sys.prefix)
    if environment.kind == "venv":
        if not (path / "bin/python").exists():
            raise UserError(f"environment.path {path}: no virtual environment: it has no bin/python")
        return path.absolute()
    if environment.kind == "pyxis" and not environment.stage and not path.exists():
        return path  # an image of a registry, as enroot names it
    if not path.is_file():
        raise UserError(f"environment.path {path}: no such image")
    return path.absolute()


def _staged(environment: EnvironmentConfig, source: Path) -> Staged:
    file = source.with_name(f"{source.name}.tar") if environment.kind == "venv" else source
    try:
        state = file.stat()
    except OSError:
        raise UserError(
            f"environment.stage: {file}: no such file; make it: tar -C {shlex.quote(str(source))} -cf "
            f"{shlex.quote(str(file))} ."
        ) from None
    return Staged(file, f"{source.name}-{state.st_mtime_ns:x}-{state.st_size:x}")


def _program(environment: EnvironmentConfig, source: str, gpus: bool) -> list[str]:
    if environment.kind == "venv":
        return [f"{source}/bin/python", *MODULE]
    if environment.kind == "pyxis":
        return [environment.python, *MODULE]
    binds = [word for mount in environment.mounts for word in ("--bind", str(mount))]
    return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, source, environment.python, *MODULE]


def _container(environment: EnvironmentConfig) -> list[str]:
    """srun's options that start an image by enroot/pyxis."""
    if environment.kind != "pyxis":
        return []
    mounts = ",".join(f"{mount}:{mount}" for mount in environment.mounts)
    return [f"--container-image={_source(environment)}", *([f"--container-mounts={mounts}"] if mounts else [])]


def _job_name(run_dir: Path) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in run_dir.absolute().name) or "llada"
