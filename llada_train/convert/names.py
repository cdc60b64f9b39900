"""The one table of names: LLaDA in Hugging Face format ↔ our global tensors.

Three of ours hold several of theirs: `linear_qkv` is, for each key-value head, its query heads, its key, its value
(megatron's order); `linear_fc1` is gate and up. In theirs, query head h reads key-value head h // (heads per group).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llada_train.config.schema import ModelConfig
from llada_train.model.sizes import tensor_specs

_OUTSIDE = {
    "embedding.weight": "model.transformer.wte.weight",
    "decoder.final_layernorm.weight": "model.transformer.ln_f.weight",
    "head.weight": "model.transformer.ff_out.weight",
}
_IN_LAYER = {
    "input_layernorm": ("attn_norm",),
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("attn_out",),
    "pre_mlp_layernorm": ("ff_norm",),
    "mlp.linear_fc1": ("ff_proj", "up_proj"),
    "mlp.linear_fc2": ("ff_out",),
}


class GlobalWeights(Protocol):
    """Named global tensors, whatever the layout that they were trained on: a checkpoint, or a Hugging Face folder."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor:
        """fp32, in the global shape of `llada_train.model.sizes.tensor_specs`."""
        ...


def hf_names(name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that our global tensor `name` holds, in the order of `split` and `join`."""
    if name in _OUTSIDE:
        return (_OUTSIDE[name],)
    layer, _, module = name.removeprefix("decoder.layers.").removesuffix(".weight").partition(".")
    return tuple(f"model.transformer.blocks.{layer}.{theirs}.weight" for theirs in _IN_LAYER[module])


def our_names(model: ModelConfig) -> dict[str, tuple[str, int]]:
    """For every Hugging Face tensor of the model, our global tensor that holds it, and as which piece."""
    return {theirs: (name, i) for name in tensor_specs(model) for i, theirs in enumerate(hf_names(name))}


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its shape."""
    return {
        theirs: tuple(piece.shape)
        for name, spec in tensor_specs(model).items()
        for theirs, piece in zip(
            hf_names(name), split(name, torch.empty(spec.shape, device="meta"), model), strict=True
        )
    }


def split(name: str, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Our global tensor → the tensors `hf_names(name)`; they may share its memory."""
    if name.endswith("linear_qkv.weight"):
        groups = tensor.view(model.num_kv_heads, -1, model.head_dim, model.hidden_size)
        q, k, v = groups.split([model.num_heads // model.num_kv_heads, 1, 1], dim=1)
        return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
    if name.endswith("linear_fc1.weight"):
        return tensor.unbind(0)
    return (tensor,)


def join(name: str, pieces: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """The tensors `hf_names(name)` → our global tensor; the inverse of `split`."""
    if name.endswith("linear_qkv.weight"):
        groups = [piece.view(model.num_kv_heads, -1, model.head_dim, model.hidden_size) for piece in pieces]
        return torch.cat(groups, dim=1).flatten(0, 2)
    if name.endswith("linear_fc1.weight"):
        return torch.stack(tuple(pieces))
    return pieces[0]
