"""Loading a run's state into an engine of any layout; collective over all ranks, which decide alike."""

import sys
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from llada_train.checkpoint.manifest import DamagedError, Progress, read_manifest
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import checkpoints, none_is_sound, point_latest_at, set_aside
from llada_train.config.errors import UserError
from llada_train.config.load import differences
from llada_train.model.sizes import MASTER
from llada_train.parallel.engine import Engine
from llada_train.parallel.topology import broadcast


def load_newest(root: Path, engine: Engine, before_sample: int | None = None) -> tuple[Path, Progress] | None:
    """Fill the engine from the newest sound checkpoint under `root`: its folder and progress; None: there is none yet.

    `before_sample`: the newest that has consumed no sample from that one on. Newer damaged ones are told on stderr and
    set aside under another name; nothing is removed.

    Raises:
        UserError: none of those that are there is sound, or one cannot be read.
    """
    damaged: list[DamagedError] = []
    # Rank 0's list: file systems show a new folder to some nodes before others.
    folders = broadcast(_candidates(root, before_sample) if dist.get_rank() == 0 else [])
    for folder in folders:
        try:
            checkpoint = open_together(folder)
        except DamagedError as error:
            damaged.append(error)
            continue
        _tell(damaged, folders, folder)
        with checkpoint, engine.topology.failing_together():
            return folder, load(checkpoint, engine)
    if damaged:
        raise none_is_sound(root, damaged)
    return None


def _candidates(root: Path, before_sample: int | None) -> list[Path]:
    return [folder for folder in reversed(checkpoints(root)) if not _has_consumed(folder, before_sample)]


def _has_consumed(folder: Path, sample: int | None) -> bool:
    """Is the sample in it? Of a damaged checkpoint nobody knows: it is told as damaged."""
    try:
        return sample is not None and read_manifest(folder).progress.consumed_samples > sample
    except UserError:
        return False


def open_together(folder: Path) -> Checkpoint:
    """Open a checkpoint and compare its files, each on one rank.

    Raises:
        DamagedError: a rank found damage; on all ranks.
        UserError: a rank cannot read it; on all ranks.
    """
    problem: UserError | None = None
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.verify(sorted(checkpoint.manifest.files)[dist.get_rank() :: dist.get_world_size()])
    except UserError as error:
        problem = error
    problems: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := [problem for problem in problems if problem is not None]:
        # A rank that cannot read a checkpoint does not make it a damaged one.
        raise next((problem for problem in found if not isinstance(problem, DamagedError)), found[0])
    return checkpoint


def load(checkpoint: Checkpoint, engine: Engine) -> Progress:
    """Fill the engine. Memory: one slice of one tensor at a time besides the engine's own.

    Raises:
        UserError: it is another model's.
    """
    state = checkpoint.state
    if checkpoint.model != engine.config.model:
        lines = differences(checkpoint.model, engine.config.model)
        raise UserError("\n  ".join([f"{checkpoint.folder}: another model (stored there → given now):", *lines]))
    engine.set_weights(lambda shard: checkpoint.read_runs(shard.name, MASTER, shard.runs()))
    for fragment in engine.fragments():
        for kind, tensor in fragment.state.items():
            if kind != MASTER:
                tensor.copy_(checkpoint.read_runs(fragment.shard.name, kind, fragment.runs()))
    engine.optimizer_steps = state.optimizer_steps
    return state.progress


def _tell(damaged: list[DamagedError], folders: list[Path], sound: Path) -> None:
    if dist.get_rank() != 0:
        return
    for folder, error in zip(folders, damaged, strict=False):  # the newest ones, in the same order
        name = folder.name
        with suppress(OSError):
            name = set_aside(folder).name
        print(
            f"warning: checkpoint {error.file}: damaged: {error.problem}; kept as {name}, taking {sound.name} instead",
            file=sys.stderr,
            flush=True,
        )
    if damaged:
        point_latest_at(sound)
