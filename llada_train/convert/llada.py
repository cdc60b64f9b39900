"""LLaDA in Hugging Face format: its names, its config.json and its code.

Three of our tensors hold several of theirs: `linear_qkv` is, for each key-value head, its query heads, its key, its
value (megatron's order); `linear_fc1` is gate and up. In theirs, query head h reads key-value head
h // (heads per group).
"""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from llada_train.config.schema import ModelConfig
from llada_train.convert.names import Piece, SpecialTokens
from llada_train.model.hf import configuration_llada, modeling_llada
from llada_train.model.hf.configuration_llada import SWITCHES, LLaDAConfig
from llada_train.model.sizes import tensor_specs

_OUTSIDE = {
    "embedding.weight": "wte",
    "decoder.final_layernorm.weight": "ln_f",
    "head.weight": "ff_out",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attention.linear_proj": "attn_out",
    "pre_mlp_layernorm": "ff_norm",
    "mlp.linear_fc2": "ff_out",
}
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"

# The settings of ModelConfig and the keys of config.json that decide them: the first one that is not null.
_SIZES = {
    "num_layers": ("n_layers",),
    "hidden_size": ("d_model",),
    "num_heads": ("n_heads",),
    "num_kv_heads": ("n_kv_heads", "n_heads"),
    "ffn_hidden_size": ("mlp_hidden_size",),
    "vocab_size": ("embedding_size", "vocab_size"),
    "max_sequence_length": ("max_sequence_length",),
    "rope_theta": ("rope_theta",),
    "norm_eps": ("rms_norm_eps",),
}
# Keys that transformers knows in other models' config.json and the released one does not have: they would mean another
# model of the same tensors.
_NOT_LLADAS: dict[str, Any] = {"rope_scaling": None, "tie_word_embeddings": False}


def _first(tree: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((tree[key] for key in keys if tree.get(key) is not None), None)


class _Llada:
    model_type = "llada"
    code: Sequence[ModuleType] = (configuration_llada, modeling_llada)

    def pieces(self, model: ModelConfig) -> dict[str, Piece]:
        found = {}
        for name, spec in tensor_specs(model).items():
            if name in _OUTSIDE:
                parts = {_OUTSIDE[name]: Piece(name, spec.shape, [(0, spec.numel)])}
            else:
                layer, _, module = name.removeprefix("decoder.layers.").removesuffix(".weight").partition(".")
                if module == _QKV:
                    inside = _qkv(name, model)
                elif module == _FC1:
                    shape, size = spec.shape[1:], spec.numel // 2
                    inside = {"ff_proj": Piece(name, shape, [(0, size)]), "up_proj": Piece(name, shape, [(size, size)])}
                else:
                    inside = {_IN_LAYER[module]: Piece(name, spec.shape, [(0, spec.numel)])}
                parts = {f"blocks.{layer}.{theirs}": piece for theirs, piece in inside.items()}
            found.update({f"model.transformer.{theirs}.weight": piece for theirs, piece in parts.items()})
        return found

    def hf_config(self, model: ModelConfig, tokens: SpecialTokens) -> LLaDAConfig:
        """As in the released one, the vocabulary counts the rows that only pad it."""
        return LLaDAConfig(
            d_model=model.hidden_size,
            n_layers=model.num_layers,
            n_heads=model.num_heads,
            n_kv_heads=model.num_kv_heads,
            mlp_hidden_size=model.ffn_hidden_size,
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_sequence_length,
            rope_theta=model.rope_theta,
            rms_norm_eps=model.norm_eps,
            mask_token_id=tokens.mask,
            eos_token_id=tokens.eos,
            pad_token_id=tokens.eos,
        )

    def model_config(self, tree: Mapping[str, Any]) -> ModelConfig:
        problems = [
            f"{key} is {tree[key]!r}; a LLaDA has {only!r}"
            for key, only in (SWITCHES | _NOT_LLADAS).items()
            if key in tree and tree[key] != only
        ]
        given = {ours: _first(tree, keys) for ours, keys in _SIZES.items()}
        ratio, width = tree.get("mlp_ratio"), tree.get("d_model")
        if given["ffn_hidden_size"] is None and isinstance(ratio, int) and isinstance(width, int):
            given["ffn_hidden_size"] = ratio * width
        problems += [f"{_SIZES[ours][0]}: missing" for ours, value in given.items() if value is None]
        try:
            model = ModelConfig.model_validate({ours: value for ours, value in given.items() if value is not None})
        except ValidationError as error:
            for one in error.errors():
                ours = str(one["loc"][0]) if one["loc"] else one["ctx"]["key"]
                problems += [f"{_SIZES[ours][0]}: {one['msg']}"] if one["type"] != "missing" else []
            raise ValueError("\n".join(problems)) from None
        if model.vocab_size != model.padded_vocab_size:
            problems.append(f"embedding_size: {model.vocab_size} rows; only multiples of 128 can be trained here")
        if problems:
            raise ValueError("\n".join(problems))
        return model


def _qkv(name: str, model: ModelConfig) -> dict[str, Piece]:
    """The rows of each group: its query heads, its key head, its value head."""
    head = model.head_dim * model.hidden_size
    queries = model.num_heads // model.num_kv_heads
    group = (queries + 2) * head
    places = {"q_proj": (0, queries), "k_proj": (queries, 1), "v_proj": (queries + 1, 1)}
    pieces = {}
    for theirs, (first, count) in places.items():
        runs = [(g * group + first * head, count * head) for g in range(model.num_kv_heads)]
        rows = math.prod((model.num_kv_heads, count, model.head_dim))
        pieces[theirs] = Piece(name, (rows, model.hidden_size), runs)
    return pieces


LLADA = _Llada()
