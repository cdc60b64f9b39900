"""Records of a data set → dialogues, in the shapes that the field publishes them in.

| shape | keys |
|---|---|
| messages (OpenAI) | `messages`: [{role, content}, …] |
| ShareGPT | `conversations`: [{from, value}, …], from: system, human, gpt |
| Alpaca | `instruction`, `output` and, where there is one, `input` |
| prompt and response | `prompt` and `response` (or `completion`), `question` and `answer` |

Another shape is told by `columns`.
"""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada_train.config.errors import UserError
from llada_train.config.schema import ColumnsConfig
from llada_train.data.chat import DialogueError, Message
from llada_train.data.formats import Advance, Rejection, read_objects
from llada_train.data.storage import matches

SHAPES = (
    ColumnsConfig(messages="messages"),
    ColumnsConfig(messages="conversations"),
    ColumnsConfig(prompt="instruction", input="input", response="output"),
    ColumnsConfig(prompt="instruction", response="output"),
    ColumnsConfig(prompt="prompt", response="response"),
    ColumnsConfig(prompt="prompt", response="completion"),
    ColumnsConfig(prompt="question", response="answer"),
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

SUFFIXES = (".jsonl", ".ndjson", ".json", ".gz", ".zst", ".parquet", ".arrow")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_OTHER_FILES = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}  # of a `datasets` folder


def files_of(path: Path) -> list[Path]:
    """A file, those that fit a pattern (*, ?, [...]), or those of a folder, in the order of their names.

    Raises:
        UserError: there is none, or they are of several splits.
    """
    if path.is_file():
        return [path]
    inside = map(Path, matches(str(path))) if glob.has_magic(str(path)) else path.rglob("*")
    found = sorted(
        file
        for file in inside
        if file.suffix in SUFFIXES and file.name not in _OTHER_FILES and not file.name.startswith((".", "cache-"))
    )
    if not found:
        fault = "no data set" if path.exists() or glob.has_magic(str(path)) else "no such file or folder"
        raise UserError(f"{path}: {fault}; give a file, a pattern or a folder of {', '.join(SUFFIXES)}")
    # As `datasets` and its hub name them: train-00000-of-00002.parquet, train/data-00000-of-00001.arrow.
    kept = (path / "dataset_dict.json").exists()
    splits = sorted({file.parent.name if kept else match[1] for file in found if (match := _SHARD.match(file.name))})
    if len(splits) > 1:
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; give one, as a folder or as {splits[0]}*")
    return found


def recognised(record: dict[str, Any]) -> ColumnsConfig | None:
    """The first shape whose keys a record has."""
    return next((shape for shape in SHAPES if shape.keys <= record.keys()), None)


def messages_of(record: dict[str, Any], columns: ColumnsConfig) -> list[Message]:
    """The dialogue of a record; it ends with the assistant.

    Raises:
        DialogueError: what is wrong with it.
    """
    if columns.messages is not None:
        messages = _messages(record.get(columns.messages), columns.messages)
    else:
        messages = _pair(record, columns)
    if columns.system is not None and record.get(columns.system):
        messages.insert(0, Message("system", _text(record, columns.system)))
    roles = [message.role for message in messages]
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if not asked or asked[-1] != "assistant":
        raise DialogueError("does not end with a response")
    expected = ["user", "assistant"] * (len(asked) // 2)
    if asked != expected:
        raise DialogueError(f"user and assistant do not take turns: {', '.join(roles)}")
    for message in messages:
        if message.role == "assistant" and not message.content.strip():
            raise DialogueError("has an empty response")
    return messages


def _pair(record: dict[str, Any], columns: ColumnsConfig) -> list[Message]:
    assert columns.prompt is not None and columns.response is not None
    prompt = _text(record, columns.prompt)
    if columns.input is not None and record.get(columns.input):
        prompt = f"{prompt}\n\n{_text(record, columns.input)}"
    return [Message("user", prompt), Message("assistant", _text(record, columns.response))]


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DialogueError(f"no list of messages under the key {key!r}")
    messages = []
    for item in value:
        role, content = (item.get("role", item.get("from")), item.get("content", item.get("value")))
        if role not in ROLES:
            raise DialogueError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DialogueError(f"a message of {role!r} without text")
        messages.append(Message(ROLES[role], content))
    return messages


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DialogueError(f"no text under the key {key!r}")
    return value


class Records:
    """The dialogues of a data set, in the order of its files and lines."""

    def __init__(self, path: Path, columns: ColumnsConfig | None) -> None:
        """
        Raises:
            UserError: there is no file, or the shape of its first record is not known, or it has other columns.
        """
        self.path = path
        self.files = files_of(path)
        refused: list[str] = []
        for place, record in self._objects(lambda size: None):
            if not isinstance(record, Rejection):
                first = record
                break
            refused.append(f"{place}: {record.reason}")
        else:
            because = refused[0] if refused else "empty"
            raise UserError(f"{path}: no record in it ({because}); give .jsonl, .parquet, .arrow or a list in .json")
        found = columns or recognised(first)
        if found is None or not found.keys - {found.input, found.system} <= first.keys():
            keys = ", ".join(first)
            raise UserError(
                f"{path}: its records have the keys {keys}; say which is which, for example "
                "data.corpora.0.columns.prompt=… data.corpora.0.columns.response=…, or columns.messages=…"
            )
        self.columns = found

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def dialogues(self, advance: Advance) -> Iterator[tuple[str, list[Message] | DialogueError]]:
        """Each record's place, for people, and its dialogue, or why it has none."""
        for place, record in self._objects(advance):
            if isinstance(record, Rejection):
                yield place, DialogueError(record.reason)
                continue
            try:
                yield place, messages_of(record, self.columns)
            except DialogueError as error:
                yield place, error

    def _objects(self, advance: Advance) -> Iterator[tuple[str, dict[str, Any] | Rejection]]:
        for file in self.files:
            noun = "row" if file.suffix in (".parquet", ".arrow") else "item" if file.suffix == ".json" else "line"
            for number, record in read_objects(file, advance):
                yield f"{file}, {noun} {number}", record
