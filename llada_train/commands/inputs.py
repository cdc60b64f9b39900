"""What a user gives the commands around a model, checked before the model is loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from llada_train.config.schema import ModelConfig


def json_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with at least one of `keys`.

    Raises:
        UserError: it cannot be read, or a line is none; with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, Mapping) or not any(key in row for key in keys):
            raise UserError(f"{path}:{number}: expected an object with {' or '.join(keys)}")
        found.append(dict(row))
    if not found:
        raise UserError(f"{path}: empty; write a JSON object with {' or '.join(keys)} on each line")
    return found


def check_length(tokens: int, model: "ModelConfig", name: str) -> None:
    """Raises UserError: `name` is longer than what the model was made for."""
    if tokens > model.max_sequence_length:
        raise UserError(
            f"{name}: {tokens} tokens with what is to be generated, but the model takes {model.max_sequence_length} "
            "(max_sequence_length); give less"
        )


def write_whole(path: Path, text: str) -> None:
    """Beside it and renamed. Raises UserError: it cannot be written."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
