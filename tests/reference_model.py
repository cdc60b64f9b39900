"""The tiny model, weights given by a formula, that the released code was run on once."""

from collections.abc import Iterator

import torch

from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM

MASK = 15


def tensor_names(layers: int) -> Iterator[str]:
    yield "model.transformer.wte.weight"
    for i in range(layers):
        for name in (
            "attn_norm",
            "q_proj",
            "k_proj",
            "v_proj",
            "attn_out",
            "ff_norm",
            "ff_proj",
            "up_proj",
            "ff_out",
        ):
            yield f"model.transformer.blocks.{i}.{name}.weight"
    yield "model.transformer.ln_f.weight"
    yield "model.transformer.ff_out.weight"


def formula_model(kv_heads: int, a: float = 0.5, c: float = 0.0) -> LLaDAModelLM:
    """Element j of tensor n is sin(1 + 0.37j + 1.7n + c·j²), scaled by a in matrices, 1 + 0.1· in norms."""
    sizes = {"d_model": 8, "n_heads": 2, "n_kv_heads": kv_heads, "n_layers": 2, "mlp_hidden_size": 12, "vocab_size": 16}
    config = LLaDAConfig(**sizes, mask_token_id=MASK, eos_token_id=0, pad_token_id=0)
    model = LLaDAModelLM(config).eval()
    parameters = dict(model.named_parameters())
    names = list(tensor_names(layers=2))
    assert set(names) == set(parameters)
    for n, name in enumerate(names):
        parameter = parameters[name]
        j = torch.arange(parameter.numel(), dtype=torch.float64)
        v = torch.sin(1 + 0.37 * j + 1.7 * n + c * j**2).float().view_as(parameter)
        parameter.data = 1 + 0.1 * v if parameter.ndim == 1 else a * v
    return model
