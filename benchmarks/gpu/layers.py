"""One transformer layer of the 8B: ours with each set of kernels, megatron-core's own, and the plain one."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from benchmarks.gpu.measure import Ceilings, Plot, Row, Section, Sizes, gib, peak_memory, row, seconds
from llada_train.config.errors import UserError
from llada_train.config.schema import Config
from llada_train.convert.llada import LLADA
from llada_train.convert.names import SpecialTokens
from llada_train.model.attention import AttentionInputs, rotary_tables
from llada_train.model.hf.modeling_llada import LLaDALlamaBlock, rotary_angles
from llada_train.model.kernels import kernels
from llada_train.model.sizes import non_embedding_parameter_count
from llada_train.model.transformer import layer_spec, transformer_config

Layer = tuple[torch.nn.Module, Callable[[Tensor], Tensor]]


def _megatron_config(config: Config, use_cpu: bool) -> TransformerConfig:
    training = config.training
    return transformer_config(config.model, config.parallel, training.precision, training.recompute, use_cpu)


def layers(sizes: Sizes, ceiling: Ceilings) -> Section:
    """Forward and backward over the micro-batch, nothing recomputed."""
    config = sizes.config(training__recompute="none", model__num_layers=1)
    S, H = config.data.sequence_length, config.model.hidden_size
    per_token = 6 * (non_embedding_parameter_count(config.model) - H) + 12 * S * H  # the final norm is no part of it
    rows: list[Row] = []
    for side, build in _sides(config, sizes):
        for B in sizes.micro_batches:

            def measure(build: Callable[[int], Layer] = build, B: int = B) -> Row:
                module, forward = build(B)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.normal_(0, 0.02)
                shape = (B, S, H) if isinstance(module, LLaDALlamaBlock) else (S, B, H)
                x = torch.randn(shape, device=sizes.device, dtype=torch.bfloat16, requires_grad=True)
                cotangent = torch.randn_like(x)
                inputs = [x, *module.parameters()]

                def step() -> None:
                    torch.autograd.grad(forward(x), inputs, cotangent)

                step()  # compiles
                with peak_memory(sizes) as peak:
                    step()
                took = seconds(step, sizes)
                flops = per_token * B * S / took
                told = {"tokens/s": B * S / took, "TFLOP/s": flops / 1e12, "of a large product": flops / ceiling.flops}
                return {"ms": took * 1e3, **told, "peak GiB": gib(peak.beyond)}

            rows.append(row({"layer": side, "micro-batch": float(B)}, measure, sizes))
    return Section(
        "One layer",
        f"{S:,} tokens, hidden size {H:,}, feed-forward {config.model.ffn_hidden_size:,}, bf16, forward and backward, "
        "nothing recomputed. FLOPs of a token: 6·N + 12·S·H, N the layer's parameters. megatron-core's layers are "
        "those of GPTModel without a mask; the plain one is that of model/hf.",
        rows=rows,
        plot=Plot(x="micro-batch", y="tokens/s", lines="layer"),
    )


def _sides(config: Config, sizes: Sizes) -> Iterator[tuple[str, Callable[[int], Layer]]]:
    for name in ("torch",) if sizes.tiny else ("torch", "compile", "liger"):
        try:
            chosen = kernels(name, sizes.device)
        except UserError:
            continue
        yield f"ours, {name}", lambda B, chosen=chosen: _ours(config, chosen, B, sizes)  # type: ignore[misc]
    yield "megatron-core, local", lambda B: _megatrons(gpt_layer_specs.get_gpt_layer_local_spec, config, sizes)
    if importlib.util.find_spec("transformer_engine") is not None:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
        yield "megatron-core, Transformer Engine", lambda B: _megatrons(spec, config, sizes)
    yield "plain", lambda B: _plain(config, sizes)


def _ours(config: Config, chosen: Any, B: int, sizes: Sizes) -> Layer:
    layer = build_module(layer_spec(chosen), config=_megatron_config(config, sizes.tiny), layer_number=1)
    positions = torch.arange(config.data.sequence_length, device=sizes.device).repeat(B, 1)
    cos, sin = rotary_tables(positions, config.model.head_dim, config.model.rope_theta)
    inputs = AttentionInputs(cos=cos, sin=sin, segments=None)
    return layer, lambda x: layer(x, packed_seq_params=inputs)[0]


def _megatrons(get_spec: Callable[..., Any], config: Config, sizes: Sizes) -> Layer:
    of_megatron = _megatron_config(config, sizes.tiny)
    of_megatron.bias_activation_fusion = not sizes.tiny  # its own fusion is torch.compile's
    spec = get_spec(normalization="RMSNorm")
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    layer = build_module(spec, config=of_megatron, layer_number=1)
    rotary = RotaryEmbedding(
        config.model.head_dim,
        rotary_percent=1.0,
        rotary_base=int(config.model.rope_theta),
        use_cpu_initialization=sizes.tiny,
    )(config.data.sequence_length)
    return layer, lambda x: layer(x, attention_mask=None, rotary_pos_emb=rotary)[0]


def _plain(config: Config, sizes: Sizes) -> Layer:
    of_hf = LLADA.hf_config(config.model, SpecialTokens())
    block = LLaDALlamaBlock(of_hf, 0).to(sizes.device, torch.bfloat16)
    angles = rotary_angles(of_hf, config.data.sequence_length, sizes.device)
    return block, lambda x: block(x, angles, None)
