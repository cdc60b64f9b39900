"""Saving a run's state (fp32 masters, Adam moments, progress) while the run goes on. Whole or not at all."""

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llada_train.checkpoint.manifest import FORMAT, FileEntry, FragmentEntry, Manifest, Progress, write_manifest
from llada_train.checkpoint.store import checkpoints, clean, expired, folder_name, put_in_place, retire, sync
from llada_train.checkpoint.tensor_file import write_tensors
from llada_train.config.errors import UserError
from llada_train.data.corpus import CorpusIdentity
from llada_train.parallel.engine import Engine
from llada_train.parallel.topology import broadcast

_PACKAGES = ("llada-train", "torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class _Saving:
    """A save under way: what it will be, what this rank has of it, and the thread's result."""

    progress: Progress
    optimizer_steps: int
    fragments: list[tuple[str, FragmentEntry]]
    written: "Future[FileEntry]"


@dataclass(frozen=True)
class _Part:
    """What one rank has written."""

    file: str
    entry: FileEntry
    fragments: list[tuple[str, FragmentEntry]]


class CheckpointWriter:
    """Writes checkpoints into one folder; each rank has one, and all call the same methods in the same order.

    Each rank copies the fragments that it owns into a buffer of its own in host memory, of the size of its shard and
    kept from save to save; that is all that training waits for. A thread then writes the buffer to the rank's file and
    reads it back. The threads never talk to other ranks: when all have ended, `finish` makes their files a checkpoint.
    """

    def __init__(self, root: Path, engine: Engine, corpora: Sequence[CorpusIdentity] = ()) -> None:
        """Collective. Removes what saves that were killed have left in `root`.

        `corpora`: what the engine is trained on, so that a run that goes on is known to read the same.
        """
        self._root, self._engine, self._settings = root, engine, engine.config.checkpoint
        self._corpora = tuple(corpora)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._buffer: Tensor | None = None
        self._saving: _Saving | None = None
        self._failures = 0  # in a row
        self._file_name = f"rank-{dist.get_rank():05d}.safetensors"
        if dist.get_rank() == 0:
            clean(root)
        dist.barrier()

    @property
    def pending(self) -> bool:
        """Is there a save to finish? The same on every rank."""
        return self._saving is not None

    @property
    def writing(self) -> bool:
        """Is this rank's thread still at work on it?"""
        return self._saving is not None and not self._saving.written.done()

    def start(self, progress: Progress) -> None:
        """Begin to save the engine's state, after finishing the save before; collective. Raises as `finish`."""
        self.finish()
        self._begin(progress)

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and make it a checkpoint; collective.

        A save that fails is told on stderr; older checkpoints stay as they are.

        Raises:
            UserError: too many have failed in a row.
        """
        failed = self._settle()
        if failed is not None and self._failures >= self._settings.max_failures:
            raise _could_not_be_written(*failed)
        if failed is not None:
            self._warn(
                *failed,
                f"the run goes on; it tries again in {self._settings.interval_steps:,} steps and stops after "
                f"{self._settings.max_failures} failures in a row (this was number {self._failures})",
            )

    def settle(self) -> None:
        """`finish` for a run that ends anyway: a failure is only told."""
        if (failed := self._settle()) is not None:
            self._warn(*failed, "the run ends")

    def _settle(self) -> tuple[Path, str] | None:
        """Commit the save under way; returns its folder and what went wrong."""
        if self._saving is None:
            return None
        folder = self._folder(self._saving.progress)
        problem = self._commit(self._saving)
        return None if problem is None else (folder, problem)

    def _warn(self, folder: Path, problem: str, consequence: str) -> None:
        if dist.get_rank() == 0:
            print(
                f"warning: {folder}: THE CHECKPOINT COULD NOT BE WRITTEN: {problem}; older checkpoints are untouched "
                f"and {consequence}",
                file=sys.stderr,
                flush=True,
            )

    def save(self, progress: Progress) -> None:
        """Save the engine's state and wait until that is done; collective. Tries twice.

        Raises:
            UserError: it could not be written.
        """
        if (failed := self._settle()) is not None:
            self._warn(*failed, "the run saves once more at once")
        for _ in range(2):
            problem = self._commit(self._begin(progress))
            if problem is None:
                return
        raise _could_not_be_written(self._folder(progress), str(problem))

    def _begin(self, progress: Progress) -> _Saving:
        name = self._file_name
        owned = [fragment for fragment in self._engine.fragments() if fragment.shard.owned]
        states = {f"{kind}/{f.shard.name}": state for f in owned for kind, state in f.state.items()}
        sizes = {key: state.numel() for key, state in states.items()}
        on_gpu = self._engine.topology.device.type == "cuda"
        if self._buffer is None:
            self._buffer = torch.empty(sum(sizes.values()), pin_memory=on_gpu)
        for part, state in zip(self._buffer.split(list(sizes.values())), states.values(), strict=True):
            part.copy_(state, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        path = self._temporary(progress) / name
        self._saving = _Saving(
            progress,
            self._engine.optimizer_steps,
            [
                (
                    f.shard.name,
                    FragmentEntry(file=name, index=f.shard.index, count=f.shard.count, start=f.start, stop=f.stop),
                )
                for f in owned
            ],
            self._thread.submit(_write, path, sizes, self._buffer),
        )
        return self._saving

    def _commit(self, saving: _Saving) -> str | None:
        """Wait for all ranks and make what they wrote a checkpoint; returns what went wrong; collective."""
        self._saving = None
        outcome: _Part | str
        try:
            outcome = _Part(self._file_name, saving.written.result(), saving.fragments)
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            outcome = f"{self._file_name}: {error}"
        outcomes: list[_Part | str] = [""] * dist.get_world_size()
        dist.gather_object(outcome, outcomes if dist.get_rank() == 0 else None)
        problem = broadcast(self._complete(saving, outcomes) if dist.get_rank() == 0 else None)
        self._failures = 0 if problem is None else self._failures + 1
        return problem

    def _complete(self, saving: _Saving, outcomes: list[_Part | str]) -> str | None:
        """On rank 0: manifest, rename, `latest`; then old checkpoints go. Returns what went wrong."""
        temporary = self._temporary(saving.progress)
        try:
            if problem := next((outcome for outcome in outcomes if isinstance(outcome, str)), None):
                raise OSError(problem)
            parts = [outcome for outcome in outcomes if isinstance(outcome, _Part)]
            write_manifest(temporary, self._manifest(saving, parts))
            sync(temporary)
            put_in_place(temporary, self._folder(saving.progress))
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            shutil.rmtree(temporary, ignore_errors=True)
            return str(error)
        # Amid refused steps the run may have to go back to an older one.
        if not saving.progress.guard.skips_in_a_row:
            self._retire_expired()
        return None

    def _retire_expired(self) -> None:
        settings = self._settings
        try:
            for old in expired(checkpoints(self._root), settings.keep, settings.keep_every_steps):
                self._thread.submit(shutil.rmtree, retire(old), ignore_errors=True)
        except OSError as error:
            print(f"warning: {self._root}: old checkpoints cannot be removed: {error}", file=sys.stderr, flush=True)

    def _manifest(self, saving: _Saving, parts: list[_Part]) -> Manifest:
        tensors: dict[str, list[FragmentEntry]] = {}
        for part in parts:
            for name, entry in part.fragments:
                tensors.setdefault(name, []).append(entry)
        return Manifest(
            format=FORMAT,
            saved=datetime.now(UTC),
            progress=saving.progress,
            optimizer_steps=saving.optimizer_steps,
            versions={package: version(package) for package in _PACKAGES},
            config=self._engine.config,
            corpora=self._corpora,
            files={part.file: part.entry for part in parts},
            tensors=tensors,
        )

    def _folder(self, progress: Progress) -> Path:
        return self._root / folder_name(progress.step)

    def _temporary(self, progress: Progress) -> Path:
        return self._root / f"{folder_name(progress.step)}.tmp"


def _write(path: Path, sizes: dict[str, int], buffer: Tensor) -> FileEntry:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tensors(path, sizes, [buffer])


def _could_not_be_written(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{folder}: the checkpoint could not be written: {problem}; older checkpoints are untouched. "
        "Free some space or mend the folder, then run again: the run goes on from the newest one"
    )
