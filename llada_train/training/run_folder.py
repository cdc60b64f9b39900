"""The run folder: one run's config, logs and checkpoints, and the check that it is this run's."""

import fcntl
from pathlib import Path
from typing import IO

from llada_train.checkpoint.store import FOLDER, newest_manifest
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
    "training.deterministic",
    "training.hang_timeout_seconds",
    "training.replica_check_interval_steps",
    "data.prefetch",
)
_FREE_SECTIONS = ("optimizer.learning_rate.", "parallel.", "guard.", "checkpoint.", "validation.", "logging.")


class RunFolder:
    def __init__(self, config: Config) -> None:
        """Look at the folder, whether it exists or not; nothing is written.

        Raises:
            UserError: it belongs to a run with another config, is used although resume is never, or has checkpoints but
                none with a sound manifest.
        """
        self._config = config
        self.path = config.run_dir
        self.checkpoints = self.path / FOLDER
        self._stored = self.path / CONFIG_FILE
        found = newest_manifest(self.checkpoints)
        self.used = found is not None
        if found is not None:
            folder, manifest = found
            if config.resume == "never":
                raise UserError(
                    f"{self.path}: holds a run already (newest checkpoint: {folder.name}) and resume is 'never'; "
                    "give another run_dir, or resume=auto to go on with it"
                )
            changed = [line for line in differences(manifest.config, config) if not _free(line)]
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
            self._lock = lock(self.path)
            save_config(self._config, temporary)
            temporary.replace(self._stored)
        except OSError as error:
            raise UserError(
                f"run_dir {self.path}: cannot be written: {error.strerror or error}; "
                "give a folder that this user may write to (run_dir=…)"
            ) from None

    def release(self) -> None:
        """Let another process have the folder; without this, until this process ends, however it ends."""
        self._lock.close()


def lock(run: Path) -> IO[str]:
    """Keep others out of a run's folder until the file returned is closed or the process ends, however it ends.

    Raises:
        UserError: another run is at work in it, or it cannot be locked.
    """
    try:
        file = (run / "lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run}: another run is at work in it; wait for it to end") from None
    except OSError as error:
        raise UserError(f"{run}: cannot be locked against other runs: {error.strerror}") from None
    return file


def _free(line: str) -> bool:
    key = line.partition(":")[0]
    return key in _FREE or key.startswith(_FREE_SECTIONS)
