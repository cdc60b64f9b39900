"""`llada-train submit` and `array`: check everything, render the sbatch file, hand it to SLURM.

Imports torch only for a run that begins from a Hugging Face folder.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from llada_train.checkpoint.store import FOLDER, newest_manifest, whole_checkpoints
from llada_train.cluster import slurm
from llada_train.cluster.render import PART, array_script, folders_of, module_command, pretrain_script
from llada_train.config.cluster import ClusterConfig
from llada_train.config.errors import UserError
from llada_train.config.load import load, load_config, save_config
from llada_train.training.initial import check_initial_weights
from llada_train.training.journal import note, read_history
from llada_train.training.preflight import check_content, open_inputs

SUBMISSIONS = "slurm"  # in a run's folder, one folder for each submission
CLUSTER_PREFIX = "cluster."


def load_cluster(path: Path, overrides: Sequence[str]) -> tuple[ClusterConfig, list[str]]:
    """The site's facts with the overrides that begin with `cluster.`, and the other overrides.

    Raises:
        UserError: the file or a setting is at fault.
    """
    own = [text.removeprefix(CLUSTER_PREFIX) for text in overrides if text.startswith(CLUSTER_PREFIX)]
    return load(ClusterConfig, path, own), [text for text in overrides if not text.startswith(CLUSTER_PREFIX)]


@dataclass(frozen=True)
class Files:
    """What a submission consists of: the script, the site's facts, and what else it reads, by name."""

    folder: Path
    script: str
    cluster: ClusterConfig
    others: Mapping[str, BaseModel | str]

    def write(self) -> Path:
        """Returns the script's path.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True)
            for name, content in {"cluster.yaml": self.cluster, **self.others}.items():
                if isinstance(content, str):
                    (self.folder / name).write_text(content, encoding="utf-8")
                else:
                    save_config(content, self.folder / name)
            script = self.folder / "job.sbatch"
            script.write_text(self.script, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}; give another place for it") from None
        return script

    def remove(self) -> None:
        """As if it had never been written."""
        shutil.rmtree(self.folder)
        with suppress(OSError):  # they are not empty
            self.folder.parent.rmdir()
            self.folder.parents[1].rmdir()


def prepare(
    config_file: Path,
    overrides: Sequence[str],
    cluster_file: Path,
    nodes: int,
    accept_config_changes: bool,
    chain: int,
    look_at_data: bool = True,
) -> Files:
    """Check the run as its processes will, and render its script; nothing is written.

    Args:
        look_at_data: False: only at config and site, so that the script can be seen before there is a corpus.

    Raises:
        UserError: config, data, run folder, or the site's facts are at fault.
    """
    cluster, recipe = load_cluster(cluster_file, overrides)
    processes = nodes * cluster.node.tasks
    config = load_config(config_file, recipe, processes)
    if look_at_data:
        check_initial_weights(config)
        check_content(open_inputs(config, accept_config_changes))
    folder = _next_folder(config.run_dir.absolute() / SUBMISSIONS)
    flags = ["--accept-config-changes"] if accept_config_changes else []
    script = pretrain_script(
        cluster, folder, config.run_dir, nodes, chain == 1, folders_of(config), flags, config.command
    )
    return Files(folder, script, cluster, {"config.yaml": config})


def _next_folder(parent: Path) -> Path:
    earlier = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdecimal()]
    return parent / f"{max(earlier, default=0) + 1:04d}"


def submit(files: Files, nodes: int, chain: int) -> list[int]:
    """Submit the run as `chain` jobs, each after the one before; returns their ids.

    Raises:
        UserError: a job of the run waits or works already, or SLURM refuses this one; nothing is left behind.
    """
    run_dir = files.folder.parents[1]
    known = [job for event in read_history(run_dir) if event["event"] == "submitted" for job in event["jobs"]]
    if alive := slurm.states(known):
        job, state = next(iter(alive.items()))
        raise UserError(f"{run_dir}: job {job} of this run is {state}; wait for it, or cancel it first: scancel {job}")
    slurm.check_nodes(files.cluster.slurm.partition, nodes + files.cluster.spares)
    script = files.write()
    jobs: list[int] = []
    refusal: UserError | None = None
    try:
        for _ in range(chain):
            jobs.append(slurm.sbatch(script, f"afterany:{jobs[-1]}" if jobs else None))
    except slurm.NoAnswerError:
        refusal = UserError(
            f"sbatch: SLURM's controller did not answer, and may have taken the job or not: look with `squeue --me`. "
            f"If it has not: sbatch {script}"
        )
    except UserError as error:
        if not jobs:
            files.remove()
            raise
        refusal = UserError(f"SLURM took {len(jobs)} of {chain} jobs, {', '.join(map(str, jobs))}, then: {error}")
    note(run_dir, "submitted", jobs=jobs, nodes=nodes, folder=str(files.folder))
    if refusal is not None:
        raise refusal
    return jobs


def tokenize_array(
    cluster: ClusterConfig,
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    shards: int,
    workers: int,
    options: Sequence[str],
) -> tuple[Files, Files]:
    """`llada-data tokenize` in `shards` parts of `workers` processes each, and the job after them that joins these.

    Raises:
        UserError: an input or the tokenizer is not there.
    """
    missing = [str(path) for path in (*inputs, tokenizer) if not path.exists()]
    if missing:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    mounts = [Path.cwd(), output.parent, *(path if path.is_dir() else path.parent for path in (*inputs, tokenizer))]
    data = module_command(cluster, "data_tools.cli", mounts)
    what = [*map(str, inputs), "--tokenizer", str(tokenizer), "--output", str(output), *options]
    work = ["--workers", str(workers), "--shard", PART]
    folder = _next_folder(output.absolute().with_name(f"{output.name}.slurm"))
    parts = [f"{i}/{shards}" for i in range(shards)]
    return (
        _array(cluster, folder, "tokenize", parts, [*data, "tokenize", *what, *work], mounts, workers),
        _array(cluster, folder / "merge", "merge", [str(output)], [*data, "merge", PART], mounts, 1),
    )


def evaluate_array(cluster: ClusterConfig, run: Path) -> Files:
    """`llada-train evaluate` of each whole checkpoint of a run, into RUN/evaluations.

    Raises:
        UserError: it has none.
    """
    parts = [path.name for path in whole_checkpoints(run / FOLDER)]
    if not parts:
        raise UserError(f"{run}: has no checkpoint to evaluate")
    folder = _next_folder(run.absolute() / "evaluations")
    newest = newest_manifest(run / FOLDER)
    assert newest is not None
    mounts = [run, *folders_of(newest[1].config)]  # it may have been moved
    program = module_command(cluster, "llada_train.cli", mounts, gpu=True)
    command = [*program, "evaluate", f"{run.absolute() / FOLDER}/{PART}", "--output", f"{folder}/{PART}.json"]
    return _array(cluster, folder, "evaluate", parts, command, mounts, cluster.node.cpus_per_process, gpu=True)


def _array(
    cluster: ClusterConfig,
    folder: Path,
    name: str,
    parts: Sequence[str],
    command: Sequence[str],
    mounts: Sequence[Path],
    cpus: int | None,
    gpu: bool = False,
) -> Files:
    script = array_script(cluster, folder, name, len(parts), command, mounts, cpus, gpu)
    return Files(folder, script, cluster, {"parts": "".join(f"{part}\n" for part in parts)})


def submit_array(files: Files, dependency: str | None = None) -> int:
    """Returns the job's id.

    Raises:
        UserError: SLURM refuses it; nothing is left behind.
    """
    script = files.write()
    try:
        return slurm.sbatch(script, dependency)
    except slurm.NoAnswerError:
        raise
    except UserError:
        files.remove()
        raise


def submit_arrays(first: Files, then: Files) -> tuple[int, int]:
    """Submit an array and the job that makes one whole of its parts; returns their ids.

    Raises:
        UserError: SLURM refuses one of them; neither is left behind.
    """
    job = submit_array(first)
    try:
        return job, submit_array(then, f"afterok:{job}")
    except UserError:
        slurm.cancel(job)
        raise
