"""Reading a checkpoint by global tensor name, in pieces, from any layout. Needs no engine."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llada_train.checkpoint.manifest import (
    FILE_NAME,
    TOKENIZER,
    AnyManifest,
    DamagedError,
    FragmentEntry,
    Manifest,
    read_any_manifest,
    read_manifest,
)
from llada_train.checkpoint.store import missing_or_cut, resolve, whole_checkpoints
from llada_train.checkpoint.tensor_file import ITEM, TensorFile, sha256
from llada_train.config.schema import Config, ModelConfig
from llada_train.model.sizes import MASTER, TensorSpec, slice_runs, tensor_specs

_OPEN_FILES = 64  # at once: a checkpoint may have more files than a process may open


class Checkpoint:
    """An open checkpoint folder; a context manager. fp32 throughout."""

    def __init__(self, folder: Path) -> None:
        """Raises DamagedError: by its manifest and its files' sizes it does not hold every tensor once."""
        self.folder = folder
        self.manifest: AnyManifest = read_any_manifest(folder)
        self.model: ModelConfig = self.manifest.model
        if problem := missing_or_cut(folder, self.manifest):
            raise problem
        if self.model.num_layers > len(self.manifest.tensors):  # before a table of so many is made
            raise self._damaged("it lists fewer tensors than its config's model has layers")
        self.specs = tensor_specs(self.model)
        self._files: dict[str, TensorFile] = {}
        if set(self.manifest.tensors) != set(self.specs):
            raise self._damaged("its tensors are not those of its own config's model")
        if any(f.file not in self.manifest.files for entries in self.manifest.tensors.values() for f in entries):
            raise self._damaged("a tensor lies in a file that is not listed")
        if self.manifest.bytes < sum(spec.numel for spec in self.specs.values()) * len(self.manifest.kinds) * ITEM:
            raise self._damaged("its files are too small for its config's model")
        self._places = {name: self._places_of(name) for name in self.specs}
        self._sizes = self._tensors_of_files()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        while self._files:
            self._files.popitem()[1].close()

    @property
    def config(self) -> Config:
        """Of the run. Raises UserError: the weights are imported."""
        return self.state.config

    @property
    def state(self) -> Manifest:
        """Of the run. Raises UserError: the weights are imported."""
        return self.manifest if isinstance(self.manifest, Manifest) else read_manifest(self.folder)

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer."""
        return self.config.data.tokenizer if isinstance(self.manifest, Manifest) else self.folder / TOKENIZER

    def verify(self, files: Iterable[str], on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Compare the files' checksums, and what tensors they hold, with the manifest.

        `on_bytes` gets how many bytes more have been read. Raises DamagedError naming the first that differs.
        """
        for name in files:
            try:
                checksum = sha256(self.folder / name, on_bytes)
            except OSError as error:
                raise DamagedError(self.folder / name, error.strerror or str(error)) from None
            if checksum != self.manifest.files[name].sha256:
                raise DamagedError(self.folder / name, "its checksum differs")
            TensorFile(self.folder / name, self._sizes[name]).close()

    def names(self) -> list[str]:
        return list(self.specs)

    def read(self, name: str) -> Tensor:
        """A whole global tensor of the fp32 master weights."""
        spec = self.specs[name]
        return self.read_runs(name, MASTER, [(0, spec.numel)]).view(spec.shape)

    def read_runs(self, name: str, kind: str, runs: Iterable[tuple[int, int]]) -> Tensor:
        """Ranges (start, length) of the flattened global tensor, one after the other. [Σ length] fp32."""
        wanted = list(runs)
        out = torch.empty(sum(length for _, length in wanted))
        filled = 0
        for start, length in wanted:
            for entry, offset, count in self._places[name].find(start, length):
                self._file(entry.file).read_into(out[filled : filled + count], f"{kind}/{name}", offset)
                filled += count
        return out

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[name] = TensorFile(self.folder / name, self._sizes[name])
        return self._files[name]

    def _places_of(self, name: str) -> "_Places":
        try:
            return _Places(self.specs[name], self.manifest.tensors[name])
        except ValueError:
            raise self._damaged(f"the fragments of {name} do not make it up") from None

    def _tensors_of_files(self) -> dict[str, dict[str, int]]:
        """The elements of each tensor in each file, as the manifest has it."""
        sizes: dict[str, dict[str, int]] = {name: {} for name in self.manifest.files}
        for name, entries in self.manifest.tensors.items():
            for entry in entries:
                tensors = sizes[entry.file]
                if f"{MASTER}/{name}" in tensors:
                    raise self._damaged(f"two fragments of {name} in {entry.file}")
                tensors.update({f"{kind}/{name}": entry.stop - entry.start for kind in self.manifest.kinds})
        return sizes

    def _damaged(self, problem: str) -> DamagedError:
        return DamagedError(self.folder / FILE_NAME, problem)


@contextmanager
def open_verified(
    path: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[Checkpoint], object] = lambda checkpoint: None,
) -> Iterator[Checkpoint]:
    """The checkpoint that `path` names, or the newest of the run folder `path`, once every file has been compared.

    `on_progress` gets (bytes compared, bytes in all). `check` may raise before that, since it takes long.

    Raises:
        UserError: there is none.
        DamagedError: it is damaged; if another of the run's has all its files, that one is named.
    """
    folder = resolve(path)
    with naming_another(folder), Checkpoint(folder) as checkpoint:
        check(checkpoint)
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            on_progress(done, checkpoint.manifest.bytes)

        checkpoint.verify(checkpoint.manifest.files, count)
        yield checkpoint


@contextmanager
def naming_another(folder: Path) -> Iterator[None]:
    """Damage to the checkpoint `folder` is told with what to use instead of it."""
    try:
        yield
    except DamagedError as error:
        others = [other for other in whole_checkpoints(folder.parent) if other != folder]
        advice = f"give {others[-1]}, which has all its files" if others else "there is no other beside it"
        raise DamagedError(error.file, error.problem, advice) from None


class _Places:
    """Where each flat range of one global tensor is stored, sorted by its start."""

    def __init__(self, spec: TensorSpec, entries: list[FragmentEntry]) -> None:
        """Raises ValueError: an element is missing, or there twice."""
        self.entries = entries
        for entry in entries:
            if spec.shape[spec.partition_dim or 0] % entry.count or entry.stop > spec.numel // entry.count:
                raise ValueError
        if sum(entry.stop - entry.start for entry in entries) != spec.numel:  # before a table of them is made
            raise ValueError
        rows: list[tuple[int, int, int, int]] = []  # global start, length, entry, offset within the fragment
        for number, entry in enumerate(entries):
            offset = 0
            for start, length in slice_runs(spec, entry.index, entry.count, entry.start, entry.stop):
                rows.append((start, length, number, offset))
                offset += length
        rows.sort()
        self.table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        ends = self.table[:, 0] + self.table[:, 1]
        starts = np.append(self.table[:, 0], spec.numel)
        if not np.array_equal(np.insert(ends, 0, 0), starts):
            raise ValueError

    def find(self, start: int, length: int) -> Iterator[tuple[FragmentEntry, int, int]]:
        """(fragment, offset in it, elements) that together hold [start, start + length)."""
        row = int(np.searchsorted(self.table[:, 0], start, side="right")) - 1
        while length:
            inside = start - int(self.table[row, 0])
            count = min(length, int(self.table[row, 1]) - inside)
            yield self.entries[int(self.table[row, 2])], int(self.table[row, 3]) + inside, count
            start, length, row = start + count, length - count, row + 1
