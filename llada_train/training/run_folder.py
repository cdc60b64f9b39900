"""The run folder: one run's config, logs and checkpoints, and the check that it is this run's."""

import fcntl

from llada_train.checkpoint.manifest import read_manifest
from llada_train.checkpoint.store import FOLDER, checkpoints
from llada_train.config.errors import UserError
from llada_train.config.load import differences, save_config
from llada_train.config.schema import Config

CONFIG_FILE = "config.yaml"

# What a run has done so far does not depend on these; everything else must stay as the run began. The learning rate to
# come is the user's: LLaDA's authors lowered it at a checkpoint when the loss was not finite (paper §2.2).
_FREE = (
    "run_dir",
    "resume",
    "init_from",
    "training.micro_batch_size",
    "training.recompute",
    "training.hang_timeout_seconds",
    "training.replica_check_interval_steps",
    "data.prefetch",
)
_FREE_SECTIONS = ("optimizer.learning_rate.", "parallel.", "checkpoint.", "validation.", "logging.")


class RunFolder:
    def __init__(self, config: Config) -> None:
        """Look at the folder, whether it exists or not; nothing is written.

        Raises:
            UserError: it belongs to a run with another config, or is used although resume is never.
        """
        self._config = config
        self.path = config.run_dir
        self.checkpoints = self.path / FOLDER
        self._stored = self.path / CONFIG_FILE
        found = checkpoints(self.checkpoints)
        self.resume_from = found[-1] if found else None
        if self.resume_from is not None and config.resume == "never":
            raise UserError(
                f"{self.path}: holds a run already (newest checkpoint: {self.resume_from.name}) and resume is 'never'; "
                "give another run_dir, or resume=auto to go on with it"
            )
        if self.resume_from is not None:
            stored = read_manifest(self.resume_from).config
            changed = [line for line in differences(stored, config) if not _free(line)]
            if changed:
                raise UserError(
                    "\n  ".join(
                        [f"{self.path}: belongs to a run with another config (stored there → given now):", *changed]
                    )
                    + "\ngive another run_dir, or the run's own settings"
                )

    def prepare(self) -> None:
        """Make the folder, keep other runs out of it and write the resolved config into it; on one process.

        Raises:
            UserError: it cannot be written, or another run is at work in it.
        """
        temporary = self._stored.with_suffix(".tmp")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock()
            save_config(self._config, temporary)
            temporary.replace(self._stored)
        except OSError as error:
            raise UserError(
                f"run_dir {self.path}: cannot be written: {error.strerror or error}; "
                "give a folder that this user may write to (run_dir=…)"
            ) from None

    def release(self) -> None:
        """Let another process have the folder; without this, until this process ends, however it ends."""
        self._locked.close()

    def _lock(self) -> None:
        self._locked = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run_dir {self.path}: another run is at work in it; wait for it to end, or give another run_dir"
            ) from None


def _free(line: str) -> bool:
    key = line.partition(":")[0]
    return key in _FREE or key.startswith(_FREE_SECTIONS)
