"""The plan's arithmetic against torch's own accounts of a real forward and backward pass on one process."""

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from kept import Kept, fused_rms_norm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from llada_train.config.schema import Config, ModelConfig, ParallelConfig
from llada_train.data.batch import Batch
from llada_train.model import head, kernels
from llada_train.model.sizes import parameter_count
from llada_train.model.transformer import LLaDATransformer, transformer_config
from llada_train.parallel import topology
from llada_train.plan import flops, memory
from llada_train.plan import layout as layout_module
from llada_train.plan.flops import flops_per_token, hardware_flops_per_token, mean_masked_share
from llada_train.plan.layout import Layout

SMALL = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "ffn_hidden_size": 160,
    "vocab_size": 512,
}
LLADA_8B_SHAPED = {
    "num_layers": 2,
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 32,
    "ffn_hidden_size": 12288,
    "vocab_size": 126464,
}
LLADA_8B = ModelConfig(**{**LLADA_8B_SHAPED, "num_layers": 32})
# What the formulae leave out: ids, positions and targets, int64; whether a target is this rank's; both results, fp32.
INDEX_BYTES = 34
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with mock.patch.dict(os.environ):  # processes that later tests start must not take this one's place
        topology.quiet_engines()
        topology.initialize(ParallelConfig())
        yield
        topology.shutdown()


def config_with(
    model: dict[str, int], rows: int, length: int, recompute: str = "none", precision: str = "bf16"
) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": model,
            "data": {"tokenizer": "unused", "sequence_length": length, "corpora": [{"path": "unused"}]},
            "optimizer": {"learning_rate": [{"until_tokens": 1, "end": 1}]},
            "training": {
                "global_batch_size": rows,
                "micro_batch_size": rows,
                "precision": precision,
                "recompute": recompute,
            },
        }
    )


def all_masked(config: Config, share: int = 1) -> Batch:
    """Every position masked, or one in `share`."""
    B, S = config.training.micro_batch_size, config.data.sequence_length
    masked = torch.arange(0, B * S, share)
    return Batch(
        input_ids=torch.zeros(B, S, dtype=torch.long),
        position_ids=torch.arange(S).repeat(B, 1),
        segments=None,
        masked_positions=masked,
        targets=torch.zeros(len(masked), dtype=torch.long),
        loss_weight=torch.ones(len(masked)),
        masked_samples=masked // S,
        sample_index=torch.arange(B),
        t=torch.ones(B),
    )


def transformer(config: Config) -> LLaDATransformer:
    return LLaDATransformer(
        config.model,
        transformer_config(
            config.model, config.parallel, config.training.precision, config.training.recompute, use_cpu=True
        ),
    )


def kept_and_planned(config: Config, fused_norm: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for backward, and that the plan says it does."""
    model, batch = transformer(config), all_masked(config)
    kept = Kept(model.parameters())
    output = kept.during(lambda: model(batch))
    counted = kept.bytes
    del output  # which held the graph
    layout = Layout(config, 1, config.data.sequence_length, config.training.global_batch_size)
    planned = memory.activations(layout, 0, fused_norm) + memory.logits_kept(layout)
    if config.training.recompute == "full":  # the layers' closures hold them, and no node of the graph
        planned -= memory.rotary_tables(layout)
    return counted, planned + INDEX_BYTES * layout.tokens


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("model", "rows", "length", "precision"),
    [
        (SMALL, 2, 128, "bf16"),
        (SMALL, 4, 64, "fp32"),
        ({**SMALL, "num_kv_heads": 2}, 3, 256, "bf16"),
        ({**SMALL, "num_kv_heads": 1}, 1, 256, "bf16"),
    ],
)
def test_a_forward_pass_keeps_what_is_planned(
    model: dict[str, int], rows: int, length: int, precision: str, recompute: str
) -> None:
    """As the CPU's operations keep it, norms unfused."""
    kept, planned = kept_and_planned(config_with(model, rows, length, recompute, precision), fused_norm=False)
    assert kept == pytest.approx(planned, rel=2e-3)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_of_an_8b_keep_what_is_planned(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their real size, without its memory; norms keep what CUDA's kernel does."""
    monkeypatch.setattr(kernels.F, "rms_norm", fused_rms_norm)
    with FakeTensorMode():
        kept, planned = kept_and_planned(config_with(LLADA_8B_SHAPED, 2, 4096, recompute), fused_norm=True)
    assert kept == pytest.approx(planned, rel=1e-4)


def counted_flops(config: Config, share: int) -> int:
    """Of the matrix products of a forward and backward pass, by torch's counter."""
    model, batch = transformer(config), all_masked(config, share)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        log_normaliser, target = model(batch)
        (log_normaliser - target).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("share", [1, 2])
def test_the_hardware_does_the_flops_that_are_planned(recompute: str, share: int) -> None:
    config = config_with(SMALL, 2, 64, recompute)
    planned = hardware_flops_per_token(config, 64, 1 / share).total * 2 * 64
    assert counted_flops(config, share) == planned


def test_a_head_in_pieces_makes_its_logits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps none of them."""
    monkeypatch.setattr(head, "CHUNK", 1 << 16)
    for module in (flops, layout_module):
        monkeypatch.setattr(module, "CHUNK", 1 << 16)
    config = config_with(SMALL, 2, 128)
    assert counted_flops(config, 1) == flops.hardware_flops_per_token(config, 128, 1.0).total * 2 * 128
    kept, planned = kept_and_planned(config, fused_norm=False)
    assert kept == pytest.approx(planned, rel=5e-3)


def test_model_flops_are_those_of_a_full_head_and_unfused_attention() -> None:
    """Attention's scores are not made again there; norms are counted as if they were products, as everywhere."""
    config = config_with(SMALL, 2, 64)
    with sdpa_kernel(SDPBackend.MATH):
        counted = counted_flops(config, share=1)
    norms = 6 * (2 * config.model.num_layers + 1) * config.model.hidden_size
    assert counted == (flops_per_token(config.model, 64) - norms) * 2 * 64


def test_model_flops_of_the_8b() -> None:
    """6·N + 12·L·S·d; N is without the input embedding."""
    assert flops_per_token(LLADA_8B, 4096) == 6 * 7_497_584_640 + 12 * 32 * 4096 * 4096
    assert parameter_count(LLADA_8B) == 8_015_581_184


def test_half_of_all_positions_are_masked() -> None:
    config = config_with(SMALL, 2, 64)
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    epsilon: Any = config.objective.epsilon
    assert mean_masked_share(config) == pytest.approx(float(((1 - epsilon) * uniform + epsilon).mean()), abs=5e-3)
