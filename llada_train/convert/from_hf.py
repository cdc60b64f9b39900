"""Import from Hugging Face format: an exported or released LLaDA folder as initial weights."""

import json
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
    """The global tensors of a LLaDA folder in Hugging Face format, read one at a time from its safetensors files."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Check config.json and every tensor's name and shape against `model`, by the files' headers alone.

        Raises:
            UserError: no such folder, not a LLaDA, cut files, or another model than `model`; all differences listed.
        """
        self._model = model
        self._check_config(folder)
        self._files: dict[str, Path] = {}
        problems: list[str] = []
        expected = hf_shapes(model)
        for file in _safetensors_files(folder):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a mapping
                        self._files[name] = file
                        shape = tuple(tensors.get_slice(name).get_shape())
                        if name not in expected:
                            problems.append(f"{name}: not a tensor of this model")
                        elif shape != expected[name]:
                            problems.append(f"{name}: shape {list(shape)}, the config's is {list(expected[name])}")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: cannot be read ({error}); copy or download it again") from None
        problems += [f"{name}: missing" for name in expected if name not in self._files]
        if problems:
            more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            lines = "".join(f"\n  {problem}" for problem in problems[:_LISTED] + more)
            raise UserError(f"{folder}: its tensors are not those of the config's model:{lines}")

    def names(self) -> list[str]:
        return list(tensor_specs(self._model))

    def read(self, name: str) -> Tensor:
        """Our global tensor `name`, fp32."""
        return join(name, [self._read_piece(theirs) for theirs in hf_names(name)], self._model)

    def _read_piece(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name).to(torch.float32)

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
