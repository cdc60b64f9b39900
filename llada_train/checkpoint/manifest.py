"""The one JSON file that says what a checkpoint holds and where each piece of each tensor lies.

A checkpoint is a folder of one safetensors file per rank, each with the ZeRO fragments that the rank owned, and
`manifest.json`. Tensors have the global names and shapes of llada_train.model.sizes, so that any layout reads what any
other wrote.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.data.timeline import Phase

FILE_NAME = "manifest.json"
MAX_BYTES = 1 << 28  # a manifest of a 1,024-rank 8B run is about 2 MiB
FORMAT = 1


# A name in the checkpoint's own folder: a manifest from elsewhere must not reach out of it.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FragmentEntry(_Strict):
    """Flat elements [start, stop) of slice `index` of `count` of a tensor, in `file`."""

    file: FileName
    index: NonNegativeInt
    count: PositiveInt
    start: NonNegativeInt
    stop: NonNegativeInt


class Progress(_Strict):
    """Where a run stands, besides its tensors."""

    step: NonNegativeInt
    consumed_samples: NonNegativeInt
    phases: tuple[Phase, ...] = ()  # that these samples belong to


class Manifest(_Strict):
    format: int
    progress: Progress
    optimizer_steps: NonNegativeInt
    versions: dict[str, str]
    config: Config
    files: dict[FileName, FileEntry]
    tensors: dict[str, list[FragmentEntry]]


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError: the folder is no checkpoint, or its manifest is damaged."""
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes is too large for a manifest; is it a checkpoint's?")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {FILE_NAME}, so this is no checkpoint; give a run folder or one of its checkpoints/step-*"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise UserError(f"{path}: damaged: {where}{first['msg']}; use an older checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: format {manifest.format}, but this version reads format {FORMAT}")
    return manifest
