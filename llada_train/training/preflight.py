"""What can be found at fault before any process of a run has started. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llada_train.checkpoint.manifest import read_manifest
from llada_train.checkpoint.store import is_hf_folder, resolve
from llada_train.config.errors import UserError
from llada_train.config.load import differences, load_config
from llada_train.config.schema import Config, ModelConfig
from llada_train.data.rows import PretrainingData
from llada_train.training.metrics import read_metrics
from llada_train.training.run_folder import RunFolder


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked against each other, and the folder that it writes to."""

    config: Config
    data: PretrainingData
    run: RunFolder


def open_inputs(
    config_file: Path, overrides: Sequence[str], world_size: int, accept_config_changes: bool = False
) -> Inputs:
    """Open everything that the config names; nothing is written.

    Raises:
        UserError: config, data, tokenizer, run folder or `init_from` are at fault.
    """
    config = load_config(config_file, overrides, world_size)
    inputs = Inputs(config, PretrainingData(config), RunFolder(config, accept_config_changes))
    read_metrics(config.run_dir)
    if config.init_from is not None and not inputs.run.used and not is_hf_folder(config.init_from):
        _check_checkpoint(config.init_from, config.model)
    return inputs


def _check_checkpoint(path: Path, model: ModelConfig) -> None:
    lines = differences(read_manifest(resolve(path)).config.model, model)
    if lines:
        raise UserError("\n  ".join([f"init_from {path}: another model (stored there → given now):", *lines]))
