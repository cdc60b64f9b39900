"""Which checkpoints a run folder holds, and which of them stay. Imports no torch.

step-00001000            complete
step-00001000.tmp        being written, or left by a save that was killed
step-00001000.old        about to be replaced by one of the same step
step-00001000.removed    being removed
step-00001000.damaged    set aside: never counted, never removed
"""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llada_train.checkpoint.manifest import FILE_NAME, DamagedError, Manifest, Stored, read_manifest
from llada_train.config.errors import UserError

FOLDER = "checkpoints"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})(?:\.old)?")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.partition(".")[0].removeprefix("step-"))


def checkpoints(root: Path) -> list[Path]:
    """Checkpoints under `root`, oldest first; sound or damaged, but not those half-written or set aside."""
    if not root.is_dir():
        return []
    # Of a step's two, while one replaces the other, the new one.
    newest = {step_of(path): path for path in sorted(root.iterdir(), reverse=True) if _NAME.fullmatch(path.name)}
    return [newest[step] for step in sorted(newest)]


def whole_checkpoints(root: Path) -> list[Path]:
    """Those whose manifest is sound and whose files are all there, in their sizes; no checksum is compared."""
    return [folder for folder in checkpoints(root) if problem_at_sight(folder) is None]


def problem_at_sight(folder: Path) -> UserError | None:
    """What is wrong with a checkpoint, as far as it shows without reading the tensors."""
    try:
        return missing_or_cut(folder, read_manifest(folder))
    except UserError as error:
        return error


def newest_manifest(root: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint under `root` whose manifest is sound; None: there never was one.

    Raises:
        UserError: there are only damaged ones, or one cannot be read.
    """
    damaged = []
    for folder in reversed(checkpoints(root)):
        try:
            return folder, read_manifest(folder)
        except DamagedError as error:
            damaged.append(error)
    if damaged or already_aside(root):
        raise none_is_sound(root, damaged)
    return None


def none_is_sound(root: Path, damaged: Sequence[DamagedError]) -> UserError:
    told = [f"{error.file}: {error.problem}" for error in damaged]
    told += [f"{folder}: set aside as damaged" for folder in already_aside(root)]
    return UserError(
        "\n  ".join([f"{root}: none of the run's checkpoints is sound:", *told])
        + "\nnothing was removed; restore one from a copy, or begin anew with another run_dir (init_from=… takes the "
        "weights of any other run)"
    )


def missing_or_cut(folder: Path, manifest: Stored) -> DamagedError | None:
    for name, entry in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "the file is missing" if size is None else f"{size:,} bytes, but {entry.size:,} were written"
            return DamagedError(file, found)
    return None


def remove_newer(checkpoint: Path) -> None:
    """Remove the checkpoints of its run that are newer than it.

    Raises:
        UserError: they cannot be removed.
    """
    found = checkpoints(checkpoint.parent)
    try:
        for folder in reversed(found[found.index(checkpoint) + 1 :]):
            shutil.rmtree(retire(folder), ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be removed: {error.strerror}; mend the folder's permissions") from None
    point_latest_at(checkpoint)


def is_hf_folder(path: Path) -> bool:
    """A Hugging Face folder has a config.json; a checkpoint or a run folder has not."""
    return (path / "config.json").exists()


def resolve(path: Path) -> Path:
    """A checkpoint folder itself, or the newest one of a run folder.

    Raises:
        UserError: there is neither.
    """
    if (path / FILE_NAME).exists():
        return path
    found = checkpoints(path / FOLDER)
    if not found and is_hf_folder(path):
        raise UserError(f"{path}: a Hugging Face folder; give a run folder or a checkpoint")
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run folder, a checkpoint or a Hugging Face folder")
    if not found:
        raise UserError(
            f"{path}: neither a checkpoint (no {FILE_NAME}) nor a run folder with one (no {FOLDER}/step-*), nor a "
            "Hugging Face folder (no config.json)"
        )
    return found[-1]


def check_model(path: Path) -> None:
    """
    Raises:
        UserError: it is no Hugging Face folder, and `resolve` finds no checkpoint.
    """
    if not is_hf_folder(path):
        resolve(path)


def expired(folders: Sequence[Path], keep: int, keep_every_steps: int | None) -> list[Path]:
    """Of checkpoints, oldest first, those that are neither among the `keep` newest nor of a step to keep for ever."""
    return [path for path in folders[:-keep] if keep_every_steps is None or step_of(path) % keep_every_steps]


def retire(folder: Path) -> Path:
    """Take a checkpoint out of the run, in one step; returns what is left to remove."""
    return folder.rename(_unused(folder.with_name(f"{folder.name}.removed")))


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the run without removing anything; returns its new name."""
    return folder.rename(_unused(folder.with_name(f"{folder.name}.damaged")))


def _unused(path: Path) -> Path:
    found, number = path, 2
    while found.exists():
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def already_aside(root: Path) -> list[Path]:
    """Damaged checkpoints that earlier starts set aside."""
    return sorted(root.glob("step-*.damaged*"))


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a complete checkpoint to its own name. One that is there gives way, and at each moment one is there."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    point_latest_at(folder)


def point_latest_at(folder: Path) -> None:
    """`latest` is for people and scripts; a checkpoint stands without it."""
    with suppress(OSError):
        latest = folder.parent / f"{LATEST}.tmp"
        latest.write_text(f"{folder.name}\n", encoding="utf-8")
        latest.replace(folder.parent / LATEST)


def clean(root: Path) -> None:
    """Remove what killed saves and removals left."""
    standing = set(checkpoints(root))
    for pattern in ("*.tmp", "*.removed*", "*.old"):
        for remnant in root.glob(pattern):
            if remnant.is_dir() and remnant not in standing:
                shutil.rmtree(remnant, ignore_errors=True)
            elif remnant.is_file():
                remnant.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a folder's names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
