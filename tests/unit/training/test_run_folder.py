from collections.abc import Callable
from pathlib import Path

import pytest

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.training.run_folder import RunFolder


def test_a_second_run_in_the_same_folder_is_refused(make_config: Callable[..., Path]) -> None:
    config = load_config(make_config())
    first, second = RunFolder(config), RunFolder(config)
    first.prepare()
    first.lock()
    with pytest.raises(UserError, match="another run is at work in it"):
        second.lock()
