"""Which checkpoints a run folder holds."""

import re
import shutil
from pathlib import Path

from llada_train.checkpoint.manifest import FILE_NAME, read_manifest
from llada_train.config.errors import UserError

FOLDER = "checkpoints"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first; half-written ones have another name."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / FILE_NAME).exists()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_before(root: Path, sample: int) -> Path | None:
    """The newest checkpoint of a state that has consumed no sample from `sample` on; None: there is none."""
    for folder in reversed(checkpoints(root)):
        if read_manifest(folder).progress.consumed_samples <= sample:
            return folder
    return None


def remove_newer(checkpoint: Path) -> None:
    """Remove the checkpoints of its run that are newer than it."""
    found = checkpoints(checkpoint.parent)
    for folder in found[found.index(checkpoint) + 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


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
    if not found:
        raise UserError(f"{path}: neither a checkpoint (no {FILE_NAME}) nor a run folder with one (no {FOLDER}/step-*)")
    return found[-1]
