"""Which checkpoints a run folder holds."""

import re
from pathlib import Path

from llada_train.checkpoint.manifest import FILE_NAME
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
