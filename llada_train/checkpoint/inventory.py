"""What `llada-train checkpoint` tells and does: a run's checkpoints in a table, checked, thinned out."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llada_train.checkpoint.manifest import read_manifest
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import (
    FOLDER,
    already_aside,
    checkpoints,
    expired,
    missing_or_cut,
    resolve,
    retire,
    step_of,
    whole_checkpoints,
)
from llada_train.config.errors import UserError
from llada_train.config.schema import ParallelConfig
from llada_train.data.timeline import Timeline

OnBytes = Callable[[int, int], None]  # bytes read of one checkpoint, bytes in all


@dataclass(frozen=True)
class Summary:
    """A checkpoint as `llada-train checkpoint list` tells of it."""

    name: str
    step: int
    latest: bool
    problem: str | None  # at sight; of a damaged manifest nothing else is known
    samples: int | None = None
    tokens: int | None = None  # nominal
    saved: datetime | None = None
    bytes: int | None = None
    layout: str | None = None


def summaries(run: Path) -> list[Summary]:
    """Of a run folder's checkpoints, oldest first, and of those set aside.

    Raises:
        UserError: it is no run folder.
    """
    root = run / FOLDER
    if not root.is_dir():
        raise UserError(f"{run}: no run folder: it has no {FOLDER}/")
    folders = checkpoints(root)
    told = [_summary(folder, folder == folders[-1]) for folder in folders]
    return told + [Summary(path.name, step_of(path), False, "damaged; set aside") for path in already_aside(root)]


def _summary(folder: Path, latest: bool) -> Summary:
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return Summary(folder.name, step_of(folder), latest, str(error))
    problem = missing_or_cut(folder, manifest)
    progress, config = manifest.progress, manifest.config
    return Summary(
        name=folder.name,
        step=step_of(folder),
        latest=latest,
        problem=None if problem is None else str(problem),
        samples=progress.consumed_samples,
        tokens=Timeline(config, progress.phases, progress.consumed_samples).tokens(progress.consumed_samples),
        saved=manifest.saved,
        bytes=manifest.bytes,
        layout=_layout(config.parallel, len(manifest.files)),
    )


def _layout(parallel: ParallelConfig, processes: int) -> str:
    """For example: TP 2 · PP 2 · DP 4 · ZeRO 1."""
    degrees = {
        "TP": parallel.tensor_parallel,
        "PP": parallel.pipeline_parallel,
        "CP": parallel.context_parallel,
        "DP": processes // parallel.processes_per_row,
    }
    return " · ".join([*(f"{name} {n}" for name, n in degrees.items() if n > 1), f"ZeRO {parallel.zero_stage}"])


def folders_of(path: Path) -> list[Path]:
    """The checkpoint `path` itself, or all of the run folder `path`, oldest first.

    Raises:
        UserError: there is none.
    """
    newest = resolve(path)
    return [newest] if newest == path else checkpoints(path / FOLDER)


def damage(folder: Path, on_bytes: OnBytes) -> UserError | None:
    """What is wrong with a checkpoint, all checksums compared, or why it cannot be read."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_bytes(done, checkpoint.manifest.bytes)

    try:
        with Checkpoint(folder) as checkpoint:
            checkpoint.verify(checkpoint.manifest.files, count)
    except UserError as error:
        return error
    return None


def to_prune(run: Path, keep: int, keep_every_steps: int | None, on_bytes: OnBytes) -> list[Path]:
    """The checkpoints that retention by these numbers removes, oldest first.

    Those that show damage at sight neither count nor go, and the newest sound one stays, whatever the numbers are.

    Raises:
        UserError: no checkpoint is sound.
    """
    whole = whole_checkpoints(run / FOLDER)
    newest_sound = next((folder for folder in reversed(whole) if damage(folder, on_bytes) is None), None)
    if newest_sound is None:
        raise UserError(f"{run}: no checkpoint is sound, so none is removed")
    return [folder for folder in expired(whole, keep, keep_every_steps) if folder != newest_sound]


def remove(folder: Path) -> None:
    """Take a checkpoint out of the run and off the disk.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        shutil.rmtree(retire(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be removed: {error.strerror}; mend the folder's permissions") from None


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
