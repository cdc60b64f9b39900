"""The run folder: one run's config, logs and checkpoints, and the check that it is this run's."""

from pathlib import Path

from llada_train.checkpoint.store import FOLDER, checkpoints
from llada_train.config.errors import UserError
from llada_train.config.load import differences, load_config, save_config
from llada_train.config.schema import Config

CONFIG_FILE = "config.yaml"

# A run's numbers do not depend on these; everything else must stay as the run began.
_FREE = ("run_dir", "resume", "init_from", "training.micro_batch_size", "data.prefetch")
_FREE_SECTIONS = ("parallel.", "checkpoint.", "validation.", "logging.")


class RunFolder:
    def __init__(self, config: Config, is_main: bool) -> None:
        """Open or make the folder; on the main process, write the resolved config into a new one.

        Raises:
            UserError: it cannot be written, belongs to a run with another config, or is used although resume is never.
        """
        self.path = config.run_dir
        self.checkpoints = self.path / FOLDER
        stored = self.path / CONFIG_FILE
        found = checkpoints(self.checkpoints)
        self.resume_from = found[-1] if found else None
        if self.resume_from is not None and config.resume == "never":
            raise UserError(
                f"{self.path}: holds a run already (newest checkpoint: {self.resume_from.name}) and resume is 'never'; "
                "give another run_dir, or resume=auto to go on with it"
            )
        if stored.exists():
            changed = [line for line in differences(load_config(stored), config) if not _free(line)]
            if changed and self.resume_from is not None:
                raise UserError(
                    "\n  ".join(
                        [f"{self.path}: belongs to a run with another config (stored there → given now):", *changed]
                    )
                    + "\ngive another run_dir, or the run's own settings"
                )
        if is_main:
            self._prepare(config, stored)

    def _prepare(self, config: Config, stored: Path) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            temporary = stored.with_suffix(".tmp")
            save_config(config, temporary)
            temporary.replace(stored)
        except OSError as error:
            raise UserError(
                f"run_dir {self.path}: cannot be written: {error.strerror or error}; "
                "give a folder that this user may write to (run_dir=…)"
            ) from None


def _free(line: str) -> bool:
    key = line.partition(":")[0]
    return key in _FREE or key.startswith(_FREE_SECTIONS)
