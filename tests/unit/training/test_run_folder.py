from collections.abc import Callable
from pathlib import Path

import pytest

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.training.run_folder import RunFolder


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(make_config: Callable[..., Path]) -> None:
    config = load_config(make_config())
    first = RunFolder(config)
    first.prepare()
    second = RunFolder(config.model_copy(update={"resume": "never"}))
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another run is at work in it; wait for it to end"):
        second.prepare()
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == before
    first.release()
    second.prepare()
