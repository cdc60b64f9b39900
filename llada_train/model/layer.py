"""A transformer layer on megatron-core's attention and linear layers, and what selective recomputation makes again."""

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from llada_train.model.attention import AttentionInputs
from llada_train.model.kernels import Kernels


class TransformerLayer(transformer_layer.TransformerLayer):
    """h = x + attention(norm(x)), then h + mlp(norm(h)). x is [S, B, H]."""

    def forward(self, hidden_states: Tensor, *, packed_seq_params: AttentionInputs, **_: Any) -> tuple[Tensor, None]:
        selective = self.config.recompute_granularity == "selective"
        normed = _Intermediate(self.input_layernorm, hidden_states, selective)
        attended, _bias = self.self_attention(normed.value, attention_mask=None, packed_seq_params=packed_seq_params)
        normed.release(attended)
        hidden = hidden_states + attended

        normed = _Intermediate(self.pre_mlp_layernorm, hidden, selective)
        transformed, _bias = self.mlp(normed.value)
        normed.release(transformed)
        return hidden + transformed, None


class GatedMLP(MLP):
    """fc2(silu(gate) · up), gate and up from fc1."""

    def __init__(self, *arguments: Any, kernels: Kernels, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._swiglu = kernels.swiglu

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        gate_up, _bias = self.linear_fc1(hidden_states)
        product = _Intermediate(self._swiglu, gate_up, self.config.recompute_granularity == "selective")
        output, bias = self.linear_fc2(product.value)
        product.release(output)
        return output, bias


class _Intermediate:
    """function(x) between two matrix multiplications; if it is to be recomputed, dropped once it has been used."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, recompute: bool) -> None:
        # fp8=None: its default means "fp8 is on".
        self._checkpoint = CheckpointWithoutOutput(fp8=None) if recompute else None
        self.value: Tensor = function(x) if self._checkpoint is None else self._checkpoint.checkpoint(function, x)

    def release(self, used_by: Tensor) -> None:
        """Drop the value; it is made again when the gradient reaches `used_by`, computed from it."""
        if self._checkpoint is not None:
            self._checkpoint.discard_output_and_register_recompute(used_by)
