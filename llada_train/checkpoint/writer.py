"""Saving and loading a run's state: weights, fp32 masters, Adam moments, progress. Whole or not at all."""

import os
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from llada_train.checkpoint.manifest import FILE_NAME, FORMAT, FileEntry, FragmentEntry, Manifest, Progress
from llada_train.checkpoint.reader import Checkpoint, sha256
from llada_train.checkpoint.store import LATEST, checkpoints, folder_name
from llada_train.config.errors import UserError
from llada_train.config.load import differences
from llada_train.config.schema import Config
from llada_train.model.sizes import MASTER
from llada_train.parallel.engine import Engine
from llada_train.parallel.zero import Fragment


def save(root: Path, engine: Engine, config: Config, progress: Progress, keep: int) -> Path:
    """Write `root`/step-N; collective over all ranks. Afterwards `latest` names it and only `keep` remain.

    Each rank writes the fragments that it owns; rank 0 adds the manifest and renames the folder into place.

    Raises:
        UserError: any rank could not write (disk full, no permission); older checkpoints are untouched.
    """
    folder = root / folder_name(progress.step)
    temporary = root / f"{folder.name}.tmp"
    if dist.get_rank() == 0:
        for remnant in root.glob("*.tmp"):  # of a save that was killed
            shutil.rmtree(remnant, ignore_errors=True)
        with suppress(OSError):  # every rank finds out when it writes, and says why
            temporary.mkdir(parents=True)
    dist.barrier()
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _write_rank(temporary, engine))
    problem = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
    verdict = [problem]
    if dist.get_rank() == 0:
        if problem is None:
            verdict[0] = _finish(temporary, folder, outcomes, engine, config, progress)
        if verdict[0] is None:
            for old in checkpoints(root)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
    dist.broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise UserError(
            f"{folder}: the checkpoint could not be written: {verdict[0]}; older checkpoints are untouched. "
            "Free some space or mend the folder, then run again: the run goes on from the newest one"
        )
    return folder


def load(checkpoint: Checkpoint, engine: Engine) -> Progress:
    """Fill the engine from a checkpoint of any layout, after checking every file; collective over all ranks."""
    verify(checkpoint)
    if checkpoint.config.model != engine.config.model:
        lines = differences(checkpoint.config.model, engine.config.model)
        raise UserError("\n  ".join([f"{checkpoint.folder}: another model (stored there → given now):", *lines]))
    engine.set_weights(lambda shard: checkpoint.read_runs(shard.name, MASTER, shard.runs()))
    for fragment in engine.fragments():
        for kind, state in fragment.state.items():
            if kind != MASTER:
                state.copy_(checkpoint.read_runs(fragment.shard.name, kind, fragment.runs()))
    engine.optimizer_steps = checkpoint.manifest.optimizer_steps
    return checkpoint.manifest.progress


def verify(checkpoint: Checkpoint) -> None:
    """Check every file's checksum, each on one rank; collective over all ranks. Raises UserError on all of them."""
    names = sorted(checkpoint.manifest.files)
    problem: str | None = None
    try:
        checkpoint.verify(names[dist.get_rank() :: dist.get_world_size()])
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise UserError(next(found for found in problems if found))


def _write_rank(folder: Path, engine: Engine) -> str | tuple[str, FileEntry, list[tuple[str, FragmentEntry]]]:
    """Write this rank's file: (file name, entry, fragments), or what went wrong."""
    name = f"rank-{dist.get_rank():05d}.safetensors"
    path = folder / name
    try:
        fragments: list[Fragment] = [fragment for fragment in engine.fragments() if fragment.shard.owned]
        tensors: dict[str, Tensor] = {
            f"{kind}/{fragment.shard.name}": state.to("cpu", torch.float32)
            for fragment in fragments
            for kind, state in fragment.state.items()
        }
        save_file(tensors, path)
        _fsync(path)
        entry = FileEntry(size=path.stat().st_size, sha256=sha256(path))
    except Exception as error:  # whatever it is: the other ranks wait to hear of it
        return f"{path.name}: {error}"
    return (
        name,
        entry,
        [
            (
                f.shard.name,
                FragmentEntry(file=name, index=f.shard.index, count=f.shard.count, start=f.start, stop=f.stop),
            )
            for f in fragments
        ],
    )


def _finish(
    temporary: Path, folder: Path, outcomes: list[Any], engine: Engine, config: Config, progress: Progress
) -> str | None:
    """Manifest, rename, `latest`; returns what went wrong."""
    try:
        tensors: dict[str, list[FragmentEntry]] = {}
        for _, _, fragments in outcomes:
            for name, entry in fragments:
                tensors.setdefault(name, []).append(entry)
        manifest = Manifest(
            format=FORMAT,
            progress=progress,
            optimizer_steps=engine.optimizer_steps,
            versions={package: version(package) for package in ("llada-train", "torch", "megatron-core", "deepspeed")},
            config=config,
            files={name: entry for name, entry, _ in outcomes},
            tensors=tensors,
        )
        path = temporary / FILE_NAME
        path.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        _fsync(path)
        _fsync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _fsync(folder.parent)
    except Exception as error:  # whatever it is: the other ranks wait to hear of it
        return str(error)
    with suppress(OSError):  # `latest` is for people and scripts; the checkpoint stands without it
        latest = folder.parent / f"{LATEST}.tmp"
        latest.write_text(f"{folder.name}\n", encoding="utf-8")
        latest.replace(folder.parent / LATEST)
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
