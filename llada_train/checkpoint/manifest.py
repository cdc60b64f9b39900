"""The one JSON file that says what a checkpoint holds and where each piece of each tensor lies.

A checkpoint is a folder of one safetensors file per rank, each with the ZeRO fragments that the rank owned,
`manifest.json`, and the manifest's own checksum in the form of `sha256sum`. Tensors have the global names and shapes of
llada_train.model.sizes, so that any layout reads what any other wrote. Weights that were imported lie in such a folder,
too, without a run's state.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from llada_train.config.errors import UserError
from llada_train.config.schema import Config, ModelConfig
from llada_train.data.corpus import CorpusIdentity
from llada_train.data.timeline import Phase
from llada_train.model.sizes import FIRST_MOMENT, MASTER, SECOND_MOMENT

FILE_NAME = "manifest.json"
TOKENIZER = "tokenizer"  # folder of imported weights
CHECKSUM_NAME = f"{FILE_NAME}.sha256"
MAX_BYTES = 1 << 26  # a manifest of a 1,024-rank 8B run is about 2 MiB
FORMAT = 4

# A name in the checkpoint's own folder: a manifest from elsewhere must not reach out of it.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")]
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class DamagedError(UserError):
    """A checkpoint is not as it was written. `problem` says what is wrong with `file`."""

    def __init__(self, file: Path, problem: str, advice: str = "use another checkpoint") -> None:
        super().__init__(file, problem, advice)  # one rank sends it to the others
        self.file, self.problem, self.advice = file, problem, advice

    def __str__(self) -> str:
        return f"{self.file}: damaged: {self.problem}; {self.advice}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    size: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FragmentEntry(_Strict):
    """Flat elements [start, stop) of slice `index` of `count` of a tensor, in `file`."""

    file: FileName
    index: Count
    count: Annotated[Count, Field(gt=0)]
    start: Count
    stop: Count

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start > self.stop or self.index >= self.count:
            raise ValueError("no such range, or no such slice")
        return self


class GuardState(_Strict):
    """What llada_train.training.guard knows of the steps before."""

    norms: tuple[NonNegativeFloat, ...] = ()  # of the last applied steps, the newest last
    skipped_steps: Count = 0  # of the whole run
    skips_in_a_row: Count = 0
    first_skipped_sample: Count | None = None  # of those in a row
    went_back_to: Count | None = None  # step of the checkpoint that the run last went back to


class Progress(_Strict):
    """Where a run stands, besides its tensors."""

    step: Count
    consumed_samples: Count
    phases: tuple[Phase, ...] = ()  # as Timeline.begun gives them
    guard: GuardState = GuardState()


class Stored(_Strict):
    """What lies where."""

    format: int
    saved: AwareDatetime
    versions: dict[str, str]
    files: dict[FileName, FileEntry]
    tensors: dict[str, list[FragmentEntry]]

    @property
    def bytes(self) -> int:
        """Of all files that it lists."""
        return sum(entry.size for entry in self.files.values())


class Manifest(Stored):
    """A run's state: master weights and Adam's moments."""

    progress: Progress
    optimizer_steps: Count
    config: Config
    corpora: tuple[CorpusIdentity, ...]  # of config.data, in its order

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def kinds(self) -> tuple[str, ...]:
        return MASTER, FIRST_MOMENT, SECOND_MOMENT


class ImportedManifest(Stored):
    """Weights from elsewhere, without moments; their tokenizer lies in the folder `tokenizer` beside the manifest."""

    imported_from: str
    model: ModelConfig

    @property
    def kinds(self) -> tuple[str, ...]:
        return (MASTER,)


AnyManifest = Manifest | ImportedManifest
_Any: TypeAdapter[AnyManifest] = TypeAdapter(
    Annotated[
        Annotated[Manifest, Tag("run")] | Annotated[ImportedManifest, Tag("imported")],
        Discriminator(lambda tree: "imported" if isinstance(tree, dict) and "imported_from" in tree else "run"),
    ]
)


def write_manifest(folder: Path, manifest: Stored) -> None:
    """Manifest and checksum, on the disk when this returns."""
    content = manifest.model_dump_json(indent=1).encode()
    checksum = f"{hashlib.sha256(content).hexdigest()}  {FILE_NAME}\n".encode()
    for name, text in ((FILE_NAME, content), (CHECKSUM_NAME, checksum)):
        with (folder / name).open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Of a run's checkpoint. Raises as `read_any_manifest`, and UserError: it holds imported weights."""
    manifest = read_any_manifest(folder)
    if isinstance(manifest, ImportedManifest):
        raise UserError(
            f"{folder}: holds weights imported from {manifest.imported_from}, not the state of a run; begin a run from "
            "them (init_from=…)"
        )
    return manifest


def read_any_manifest(folder: Path) -> AnyManifest:
    """Raises UserError: the folder cannot be read or has another format. DamagedError: the manifest is damaged."""
    path = folder / FILE_NAME
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DamagedError(path, f"{size:,} bytes is too large for a manifest")
        content, checksum = path.read_bytes(), (folder / CHECKSUM_NAME).open("rb").read(64)
        if hashlib.sha256(content).hexdigest().encode() != checksum:
            raise DamagedError(path, f"its checksum is not that of {CHECKSUM_NAME}")
        manifest = _Any.validate_json(content)
    except FileNotFoundError as error:
        raise DamagedError(Path(error.filename), "there is no such file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"][1:]))] if part)
        raise DamagedError(path, f"{where}{first['msg']}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: format {manifest.format}, but this version reads format {FORMAT}")
    return manifest
