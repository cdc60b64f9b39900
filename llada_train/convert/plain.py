"""Our weights as the plain torch model."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llada_train.config.schema import ModelConfig
from llada_train.convert.names import GlobalWeights, hf_names, split
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM


def llada_config(model: ModelConfig, mask_id: int | None = None, eos_id: int | None = None) -> LLaDAConfig:
    """The Hugging Face config of our model; as in the released one, the vocabulary counts the padding rows."""
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
        mask_token_id=mask_id,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )


def hf_tensors(weights: GlobalWeights, model: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in Hugging Face format, one after the other, each in memory of its own."""
    for name in weights.names():
        for theirs, piece in zip(hf_names(name), split(name, weights.read(name), model), strict=True):
            yield theirs, piece.to(dtype, copy=True, memory_format=torch.contiguous_format)


def plain_model(weights: GlobalWeights, model: ModelConfig, dtype: torch.dtype = torch.float32) -> LLaDAModelLM:
    """The plain torch model with these weights, on the CPU, in evaluation mode."""
    with torch.device("meta"):
        plain = LLaDAModelLM(llada_config(model))
    plain.load_state_dict(dict(hf_tensors(weights, model, dtype)), assign=True)
    return plain.eval()
