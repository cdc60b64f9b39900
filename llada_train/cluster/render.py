"""From a site's facts and sizes to the text of an sbatch file, by the templates in launch/."""

import glob
import itertools
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llada_train.config.cluster import ClusterConfig, EnvironmentConfig
from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.data.storage import is_remote

LAUNCH = Path(__file__).parents[2] / "launch"
MODULE = ("-m", "llada_train.cli")
PART = "$part"  # of an array, in a command: one line of FOLDER/parts


@dataclass(frozen=True)
class Staged:
    source: Path
    name: str  # under the node's scratch folder: another for each version of the source


def pretrain_script(
    cluster: ClusterConfig,
    folder: Path,
    run_dir: Path,
    nodes: int,
    requeue: bool,
    folders: Sequence[Path] = (),
    flags: Sequence[str] = (),
    command: str = "pretrain",
) -> str:
    """The job that trains on `nodes`; `folder` is that of the submission, with config.yaml and cluster.yaml.

    An image sees `run_dir` and `folders`.

    Raises:
        UserError: the environment, or the archive to stage, is not there.
    """
    environment = cluster.environment
    source = _source(environment)
    staged = _staged(environment, source) if environment.stage else None
    mounts, gpus = _mounts(cluster, [run_dir, *folders]), cluster.node.gpus > 0
    in_place = shlex.join(_program(environment, str(source), mounts, gpus))
    on_local_disk = _with_variable(_program(environment, "$staged", mounts, gpus), "$staged")
    return _render(
        "pretrain.sbatch.j2",
        cluster,
        mounts,
        job_name=_job_name(run_dir),
        folder=folder,
        run_dir=run_dir.absolute(),
        nodes=nodes,
        requeue=requeue,
        command=command,
        flags=flags,
        program=in_place,
        staged=staged,
        training_program=on_local_disk if staged else in_place,
        staged_container='--container-image="$staged"' if staged and environment.kind == "pyxis" else "",
        health_minutes=math.ceil(cluster.health.timeout_seconds / 60) + 1,
    )


def array_script(
    cluster: ClusterConfig,
    folder: Path,
    name: str,
    tasks: int,
    command: Sequence[str],
    folders: Sequence[Path] = (),
    cpus: int | None = None,
    gpu: bool = False,
) -> str:
    """The array of `tasks` jobs of one task each, with one GPU if it is of use and nodes have some.

    `cpus`: None is what SLURM gives. PART in the command's words is a job's line of FOLDER/parts; an image sees
    `folders`.
    """
    return _render(
        "array.sbatch.j2",
        cluster,
        _mounts(cluster, folders),
        job_name=name,
        folder=folder,
        tasks=tasks,
        command=_with_variable(command, PART),
        cpus=cpus,
        gpu=gpu and cluster.node.gpus > 0,
    )


def folders_of(config: Config) -> list[Path]:
    """Where a run reads and writes, so that an image has to see them."""
    corpora = [_folder_of(corpus.path) for corpus in config.data.corpora if not is_remote(corpus.path)]
    # No image starts with a folder that is not there; a run that has checkpoints does not need init_from any more.
    others = [config.init_from, config.sft.cache if config.sft else None]
    return [config.run_dir, config.data.tokenizer, *corpora, *(path for path in others if path and path.exists())]


def _folder_of(prefix: str) -> Path:
    """That in which all files of a corpus are: of a pattern, what comes before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(prefix).parts[:-1]))


def _mounts(cluster: ClusterConfig, folders: Sequence[Path]) -> list[Path]:
    """Every folder that an image sees under its own name, and where links lead, but those within another one."""
    given = [*cluster.environment.mounts, Path.cwd(), LAUNCH, cluster.local_scratch, *folders]
    found: list[Path] = []
    named = {Path(os.path.normpath(path.absolute())) for path in given}  # `a/../b` is not within a
    for path in sorted(named | {path.resolve() for path in given}):
        if not any(path.is_relative_to(outer) for outer in found):
            found.append(path)
    return found


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


def module_command(cluster: ClusterConfig, module: str, folders: Sequence[Path], gpu: bool = False) -> list[str]:
    """`python -m module` in the site's environment, for a job's own script."""
    source = str(_source(cluster.environment))
    program = _program(cluster.environment, source, _mounts(cluster, folders), gpu and cluster.node.gpus > 0)
    return [module if word == MODULE[1] else word for word in program]


def _render(template: str, cluster: ClusterConfig, mounts: Sequence[Path], **values: Any) -> str:
    if not LAUNCH.is_dir():
        raise UserError(
            f"{LAUNCH}: no such folder; install llada_train from a checkout (`pip install -e`), which has them"
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
    container = _container(cluster.environment, mounts)
    return jinja.get_template(template).render(
        **site, scratch=cluster.scratch, container=container, directory=Path.cwd(), launch=LAUNCH, **values
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


def _program(environment: EnvironmentConfig, source: str, mounts: Sequence[Path], gpus: bool) -> list[str]:
    if environment.kind == "venv":
        return [f"{source}/bin/python", *MODULE]
    if environment.kind == "pyxis":
        return [environment.python, *MODULE]
    binds = [word for mount in _mountable(mounts) for word in ("--bind", mount)]
    options = [*(["--nv"] if gpus else []), *binds, "--pwd", str(Path.cwd())]
    return ["apptainer", "exec", *options, source, environment.python, *MODULE]


def _container(environment: EnvironmentConfig, mounts: Sequence[Path]) -> list[str]:
    """srun's options that start an image by enroot/pyxis."""
    if environment.kind != "pyxis":
        return []
    seen = ",".join(f"{mount}:{mount}" for mount in _mountable(mounts))
    return [
        f"--container-image={_source(environment)}",
        f"--container-mounts={seen}",
        f"--container-workdir={Path.cwd()}",
    ]


def _mountable(mounts: Sequence[Path]) -> list[str]:
    """
    Raises:
        UserError: apptainer or pyxis would take a part of a name for something else.
    """
    wrong = [str(mount) for mount in mounts if any(sign in str(mount) for sign in ":,")]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: a colon or comma cannot be in a folder that an image sees; rename it")
    return [str(mount) for mount in mounts]


def _job_name(run_dir: Path) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in run_dir.absolute().name) or "llada"
