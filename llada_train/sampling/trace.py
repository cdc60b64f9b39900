"""A page that plays how masks became text: one HTML file that loads nothing."""

import json
from pathlib import Path
from typing import Any

from llada_train.data.tokenizer import Tokenizer

_TEMPLATE = Path(__file__).with_name("trace.html")


class Recorder:
    """Records the one row of a batch; to be called with what each forward pass settled."""

    def __init__(self, row: list[int], tokenizer: Tokenizer) -> None:
        """`row`: token ids with masks, before sampling."""
        self._tokenizer = tokenizer
        self._tokens = [None if id == tokenizer.mask_id else self._text(id) for id in row]
        self._steps: list[list[dict[str, Any]]] = []

    def __call__(self, settled: list[tuple[int, int, int, float]]) -> None:
        self._steps.append([{"at": column, "text": self._text(id), "p": round(p, 4)} for _, column, id, p in settled])

    def page(self) -> str:
        """HTML."""
        data = json.dumps({"tokens": self._tokens, "steps": self._steps})
        # No token may end the script that carries it.
        return _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data.replace("<", "\\u003c"))

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id], keep_special=True)
