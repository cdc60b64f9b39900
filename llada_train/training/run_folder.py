"""The run folder: one run's config, logs and checkpoints, and the check that it is this run's."""

import fcntl
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from llada_train.checkpoint.manifest import Manifest, Progress
from llada_train.checkpoint.store import FOLDER, newest_manifest
from llada_train.config.errors import UserError
from llada_train.config.load import load_config, save_config
from llada_train.config.schema import Config
from llada_train.data.corpus import CorpusIdentity
from llada_train.training.changes import config_changes

CONFIG_FILE = "config.yaml"
CHANGES_FILE = "config_changes.jsonl"


class RunFolder:
    def __init__(self, config: Config, accept_config_changes: bool = False) -> None:
        """Look at the folder, whether it exists or not; nothing is written.

        Raises:
            UserError: it belongs to a run with another config, and the changes are not accepted or cannot be; it is
                used although resume is never; or it has checkpoints but none with a sound manifest.
        """
        self._config = config
        self.path = config.run_dir
        self.checkpoints = self.path / FOLDER
        self._stored = self.path / CONFIG_FILE
        found = newest_manifest(self.checkpoints)
        self.accepted_changes: list[str] = []
        self.corpora: tuple[CorpusIdentity, ...] = ()  # that the run was trained on
        self.progress: Progress | None = None  # as its newest checkpoint says
        if found is not None:
            folder, manifest = found
            self.corpora, self.progress = manifest.corpora, manifest.progress
            if config.resume == "never":
                raise UserError(
                    f"{self.path}: holds a run already (newest checkpoint: {folder.name}) and resume is 'never'; "
                    "give another run_dir, or resume=auto to go on with it"
                )
            self._check_config(manifest, accept_config_changes)

    def _check_config(self, manifest: Manifest, accept: bool) -> None:
        changes = config_changes(manifest.config, manifest.progress, self._config)
        if changes.impossible or (changes.possible and not accept and not self._is_the_last_config()):
            remedy = "give another run_dir, or the run's own settings"
            if not changes.impossible:
                remedy = f"{changes.hint}give --accept-config-changes to go on with these settings; or {remedy}"
            heading = f"{self.path}: belongs to a run with another config (stored there → given now):"
            raise UserError("\n  ".join([heading, *changes.impossible, *changes.possible]) + f"\n{remedy}")
        self.accepted_changes = list(changes.possible)

    def _is_the_last_config(self) -> bool:
        """Has the run had this config before, though the newest checkpoint that is left does not know of it?"""
        try:
            return load_config(self._stored) == self._config
        except UserError:
            return False

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
            raise self._unwritable(error) from None

    def record_changes(self, progress: Progress) -> None:
        """Note down that the run goes on from `progress` with the changes accepted; on one process, which has the lock.

        Raises:
            UserError: it cannot be written.
        """
        if not self.accepted_changes:
            return
        record = {
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "changes": self.accepted_changes,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path = self.path / CHANGES_FILE
        line = json.dumps(record, ensure_ascii=False)
        try:
            known = path.read_text(encoding="utf-8") if path.exists() else ""
            # A run that was killed before its next checkpoint goes on from the same one again: only the date differs.
            if line.partition(', "date"')[0] not in known:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(f"{known}{line}\n", encoding="utf-8")
                temporary.replace(path)
        except OSError as error:
            raise self._unwritable(error) from None

    def release(self) -> None:
        """Let another process have the folder; without this, until this process ends, however it ends."""
        self._lock.close()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"run_dir {self.path}: cannot be written: {error.strerror or error}; "
            "give a folder that this user may write to (run_dir=…)"
        )


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
