"""Import from Hugging Face format: an exported or released LLaDA folder as initial weights."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.config.schema import ModelConfig
from llada_train.convert.names import hf_names, hf_shapes, join
from llada_train.convert.plain import llada_config
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.sizes import tensor_specs

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# The settings of ModelConfig and the keys of config.json that must agree.
_SIZES = {
    "num_layers": "n_layers",
    "hidden_size": "d_model",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "ffn_hidden_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
_LISTED = 10


class HfWeights:
    """The global tensors of a LLaDA folder in Hugging Face format, read one at a time; a context manager."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Check config.json and every tensor's name and shape against `model`, by the files' headers alone.

        Raises:
            UserError: no such folder, not a LLaDA, cut files, or another model than `model`; all differences listed.
        """
        self._model = model
        self._check_config(folder)
        with ExitStack() as stack:
            self._files = _open_tensors(_safetensors_files(folder), stack)
            self._check_tensors(folder)
            self._stack = stack.pop_all()

    def __enter__(self) -> "HfWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(tensor_specs(self._model))

    def read(self, name: str) -> Tensor:
        """Our global tensor `name`, fp32."""
        pieces = [self._files[theirs].get_tensor(theirs).to(torch.float32) for theirs in hf_names(name)]
        return join(name, pieces, self._model)

    def _check_tensors(self, folder: Path) -> None:
        expected = hf_shapes(self._model)
        problems = [f"{name}: missing" for name in expected if name not in self._files]
        for name, file in self._files.items():
            shape = tuple(file.get_slice(name).get_shape())
            if name not in expected:
                problems.append(f"{name}: not a tensor of this model")
            elif shape != expected[name]:
                problems.append(f"{name}: shape {list(shape)}, the config's is {list(expected[name])}")
        if problems:
            more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            lines = "".join(f"\n  {problem}" for problem in problems[:_LISTED] + more)
            raise UserError(f"{folder}: its tensors are not those of the config's model:{lines}")

    def _check_config(self, folder: Path) -> None:
        path = folder / "config.json"
        theirs = _read_json(path)
        if theirs.get("model_type") != "llada":
            raise UserError(f"{path}: model_type is {theirs.get('model_type')!r}, expected 'llada'")
        try:
            found = LLaDAConfig(**theirs)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        wanted = llada_config(self._model)
        lines = [
            f"\n  {key} is {getattr(found, key)}, model.{ours} asks for {getattr(wanted, key)}"
            for ours, key in _SIZES.items()
            if getattr(found, key) != getattr(wanted, key)
        ]
        if lines:
            raise UserError(f"{path}: another model than the config's; change one of them:{''.join(lines)}")


def _open_tensors(files: list[Path], stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor."""
    tensors: dict[str, Any] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not (folder / _INDEX).exists():
        raise UserError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}; only safetensors are read")
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{folder / _INDEX}: has no weight_map; copy or download it again")
    return sorted({folder / str(file) for file in weight_map.values()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
