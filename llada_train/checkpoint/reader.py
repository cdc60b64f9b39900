"""Reading a checkpoint by global tensor name, in pieces, from any layout. Needs no engine."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llada_train.checkpoint.manifest import FILE_NAME, FragmentEntry, Manifest, read_manifest
from llada_train.config.errors import UserError
from llada_train.model.sizes import MASTER, TensorSpec, slice_runs, tensor_specs


class Checkpoint:
    """An open checkpoint folder; a context manager. fp32 throughout."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: no checkpoint, a damaged manifest, or a file that is missing or has another size."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.config = self.manifest.config
        self.specs = tensor_specs(self.config.model)
        self._files: dict[str, Any] = {}
        self._places: dict[str, _Places] = {}
        self._stack = ExitStack()
        if set(self.manifest.tensors) != set(self.specs):
            raise self._damaged("its tensors are not those of its own config's model")
        if any(f.file not in self.manifest.files for entries in self.manifest.tensors.values() for f in entries):
            raise self._damaged("a tensor lies in a file that is not listed")
        for name, entry in self.manifest.files.items():
            file = folder / name
            size = file.stat().st_size if file.exists() else None
            if size != entry.size:
                found = "is missing" if size is None else f"has {size:,} bytes, {entry.size:,} were written"
                raise UserError(f"{file}: damaged checkpoint: the file {found}; use an older checkpoint")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def verify(self, files: Iterable[str]) -> None:
        """Compare the files' checksums with the manifest's. Raises UserError naming the first that differs."""
        for name in files:
            if sha256(self.folder / name) != self.manifest.files[name].sha256:
                raise UserError(f"{self.folder / name}: damaged: its checksum differs; use an older checkpoint")

    def names(self) -> list[str]:
        return list(self.specs)

    def read(self, name: str) -> Tensor:
        """A whole global tensor of the fp32 master weights."""
        spec = self.specs[name]
        return self.read_runs(name, MASTER, [(0, spec.numel)]).view(spec.shape)

    def read_runs(self, name: str, kind: str, runs: Iterable[tuple[int, int]]) -> Tensor:
        """Ranges (start, length) of the flattened global tensor, one after the other. [Σ length] fp32."""
        if name not in self._places:
            places = _Places(self.specs[name], self.manifest.tensors[name])
            if not places.complete:
                raise self._damaged(f"the fragments of {name} do not make it up")
            self._places[name] = places
        wanted = list(runs)
        out = torch.empty(sum(length for _, length in wanted))
        filled = 0
        for start, length in wanted:
            for entry, offset, count in self._places[name].find(start, length):
                out[filled : filled + count] = self._slice(entry, f"{kind}/{name}", offset, count)
                filled += count
        return out

    def _slice(self, entry: FragmentEntry, key: str, offset: int, count: int) -> Tensor:
        path = self.folder / entry.file
        try:
            if entry.file not in self._files:
                self._files[entry.file] = self._stack.enter_context(safe_open(path, framework="pt"))
            piece: Tensor = self._files[entry.file].get_slice(key)[offset : offset + count]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged checkpoint: {key}: {error}; use an older checkpoint") from None
        if piece.shape != (count,):
            raise UserError(f"{path}: damaged checkpoint: {key} is cut short; use an older checkpoint")
        return piece

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"{self.folder / FILE_NAME}: damaged: {problem}; use an older checkpoint")


class _Places:
    """Where each flat range of one global tensor is stored, sorted by its start."""

    def __init__(self, spec: TensorSpec, entries: list[FragmentEntry]) -> None:
        self.entries = entries
        rows: list[tuple[int, int, int, int]] = []  # global start, length, entry, offset within the fragment
        for number, entry in enumerate(entries):
            if spec.shape[spec.partition_dim or 0] % entry.count or entry.stop > spec.numel // entry.count:
                continue  # no slice of this tensor: a damaged manifest
            offset = 0
            for start, length in slice_runs(spec, entry.index, entry.count, entry.start, entry.stop):
                rows.append((start, length, number, offset))
                offset += length
        rows.sort()
        self.table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        ends = self.table[:, 0] + self.table[:, 1]
        starts = np.append(self.table[:, 0], spec.numel)
        self.complete = bool(np.array_equal(np.insert(ends, 0, 0), starts))  # nothing is missing, nothing there twice

    def find(self, start: int, length: int) -> Iterator[tuple[FragmentEntry, int, int]]:
        """(fragment, offset in it, elements) that together hold [start, start + length)."""
        row = int(np.searchsorted(self.table[:, 0], start, side="right")) - 1
        while length:
            inside = start - int(self.table[row, 0])
            count = min(length, int(self.table[row, 1]) - inside)
            yield self.entries[int(self.table[row, 2])], int(self.table[row, 3]) + inside, count
            start, length, row = start + count, length - count, row + 1


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
