"""How a family of models is written in Hugging Face format, told so that one table serves both directions.

A family is a file of its own (llada_train.convert.llada), named in `FAMILIES` of llada_train.convert.from_hf: its table
says for each tensor of theirs which ranges of our global tensors it is made of, and everything else follows from that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from llada_train.config.schema import ModelConfig

Run = tuple[int, int]  # start and length in a flattened tensor


class GlobalWeights(Protocol):
    """Named global tensors, whatever the layout that they were trained on: a checkpoint, or a Hugging Face folder."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor:
        """fp32, in the global shape of `llada_train.model.sizes.tensor_specs`."""
        ...


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs: `runs` of our flattened global tensor `name`, one after the other, in `shape`."""

    name: str
    shape: tuple[int, ...]
    runs: Sequence[Run]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer; none: not known."""

    mask: int | None = None
    eos: int | None = None


class Family(Protocol):
    model_type: str
    """As config.json names it."""
    code: Sequence[ModuleType]
    """Modelling code that goes beside the weights; its files import nothing but torch, transformers and each other."""

    def pieces(self, model: ModelConfig) -> dict[str, Piece]:
        """Every tensor of theirs by its name, in forward order; together they hold each element of ours once."""
        ...

    def hf_config(self, model: ModelConfig, tokens: SpecialTokens) -> Any:
        """The transformers config that is saved as config.json."""
        ...

    def model_config(self, tree: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes.

        Raises:
            ValueError: it is none that can be trained here; one line for each reason.
        """
        ...


def sources(family: Family, model: ModelConfig) -> dict[str, list[tuple[int, int, str, int]]]:
    """For each of our global tensors, in flat order: (start, length, their tensor, offset in that one)."""
    found: dict[str, list[tuple[int, int, str, int]]] = {}
    for theirs, piece in family.pieces(model).items():
        offset = 0
        for start, length in piece.runs:
            found.setdefault(piece.name, []).append((start, length, theirs, offset))
            offset += length
    return {name: sorted(parts) for name, parts in found.items()}
