"""A user's own quality classifier: a function in a Python file."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from llada_train.config.errors import UserError

Score = Callable[[list[str]], Sequence[float]]


def load_classifier(spec: str) -> Score:
    """The function that `PATH.py:FUNCTION` names. The file is run: nothing but what the user names is ever run.

    Raises:
        UserError: no such file or function, or the file fails.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--classifier {spec}: expected FILE.py:FUNCTION, with a file that exists")
    module_spec = importlib.util.spec_from_file_location("classifier", path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: fails when it is loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}: has no function {name!r}")
    return function


def scores(function: Score, spec: str, texts: list[str]) -> list[float]:
    """One score for each text.

    Raises:
        UserError: the function fails, or does not return one number for each text.
    """
    try:
        values = [float(value) for value in function(texts)]
    except Exception as error:
        raise UserError(f"--classifier {spec}: failed: {type(error).__name__}: {error}") from error
    if len(values) != len(texts):
        raise UserError(f"--classifier {spec}: returned {len(values)} scores for {len(texts)} texts")
    return values
