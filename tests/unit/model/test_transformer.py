"""megatron-core's LLaDA against the plain one, which the reference outputs fix."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llada_train.config.schema import Config, ParallelConfig
from llada_train.convert.llada import LLADA
from llada_train.convert.plain import part_of, plain_model
from llada_train.data.batch import Batch, Segments
from llada_train.data.loader import collate
from llada_train.data.training_data import Sample
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.model.transformer import LLaDATransformer, transformer_config
from llada_train.model.weights import InitialWeights, shards
from llada_train.parallel import topology

B, S, LAYERS, H, F = 2, 12, 2, 32, 48


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with mock.patch.dict(os.environ):  # processes that later tests start must not take this one's place
        topology.quiet_engines()
        topology.initialize(ParallelConfig())
        yield
        topology.shutdown()


def config_with(kv_heads: int = 2, recompute: str = "none") -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": {
                "num_layers": LAYERS,
                "hidden_size": H,
                "num_heads": 4,
                "num_kv_heads": kv_heads,
                "ffn_hidden_size": F,
                "vocab_size": 120,
            },
            "data": {"tokenizer": "unused", "sequence_length": S, "corpora": [{"path": "unused"}]},
            "optimizer": {"learning_rate": [{"until_tokens": 1, "end": 1}]},
            "training": {
                "global_batch_size": B,
                "micro_batch_size": B,
                "precision": "fp32",
                "recompute": recompute,
            },
        }
    )


def transformer(config: Config) -> LLaDATransformer:
    """Ours, with its initial weights."""
    weights = InitialWeights(config.model, config.seed)
    ours = LLaDATransformer(
        config.model,
        transformer_config(
            config.model, config.parallel, config.training.precision, config.training.recompute, use_cpu=True
        ),
    )
    with torch.no_grad():
        for shard in shards(ours, config.model):
            shard.parameter.copy_(shard.of(weights.read(shard.name)))
    return ours


@pytest.fixture(scope="module", params=[4, 2, 1], ids=lambda heads: f"kv{heads}")
def models(request: pytest.FixtureRequest) -> tuple[Config, LLaDATransformer, LLaDAModelLM]:
    config = config_with(kv_heads=request.param)
    return config, transformer(config), plain_model(InitialWeights(config.model, config.seed), config.model)


_BORDERS = torch.tensor([0, 7, S, 2 * S], dtype=torch.int32)
FIRST_ROW_CUT = Segments(_BORDERS, _BORDERS, ((7, 7), (S - 7, S - 7), (S, S)))


def all_logits_batch(vocab: int, segments: Segments | None = None) -> Batch:
    """Every position once with every token as target, so that the target logits are all logits."""
    pairs = torch.cartesian_prod(torch.arange(B * S), torch.arange(vocab))
    generator = torch.Generator().manual_seed(0)
    return Batch(
        input_ids=torch.randint(0, vocab, (B, S), generator=generator),
        position_ids=torch.arange(S).repeat(B, 1),
        segments=segments,
        masked_positions=pairs[:, 0].contiguous(),
        targets=pairs[:, 1].contiguous(),
        loss_weight=torch.rand(len(pairs), generator=generator),
        masked_samples=pairs[:, 0] // S,
        sample_index=torch.arange(B),
        t=torch.ones(B),
    )


def test_logits_and_log_normalisers_are_the_plain_models(
    models: tuple[Config, LLaDATransformer, LLaDAModelLM],
) -> None:
    config, ours, plain = models
    batch = all_logits_batch(config.model.padded_vocab_size)
    log_normaliser, target_logit = ours(batch).detach().view(2, B, S, -1)
    expected = plain(batch.input_ids).logits.detach()
    torch.testing.assert_close(target_logit, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        log_normaliser, expected.logsumexp(-1, keepdim=True).expand_as(expected), rtol=1e-5, atol=1e-5
    )


def test_gradients_are_the_plain_models(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    config, ours, plain = models
    batch = all_logits_batch(config.model.padded_vocab_size)
    ours.zero_grad()
    log_normaliser, target_logit = ours(batch)
    (batch.loss_weight * (log_normaliser - target_logit)).sum().backward()
    plain.zero_grad()
    nll = -plain(batch.input_ids).logits.log_softmax(-1).reshape(-1)
    (batch.loss_weight * nll).sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    found = {shard.name: shard.parameter.grad for shard in shards(ours, config.model)}
    pieces = LLADA.pieces(config.model)
    assert pieces.keys() == expected.keys()
    for name, piece in pieces.items():
        gradient, ours_grad = expected[name], found[piece.name]
        assert gradient is not None and ours_grad is not None
        torch.testing.assert_close(
            part_of(ours_grad, piece), gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
        )


def test_every_position_sees_every_other(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    """Not causal: a change of the last token reaches the first position's logits, and the other way round."""
    config, ours, _ = models
    batch = all_logits_batch(config.model.padded_vocab_size)
    before = ours(batch).detach()[1].view(B, S, -1)
    for changed, seen in [(S - 1, 0), (0, S - 1)]:
        batch.input_ids[0, changed] = (batch.input_ids[0, changed] + 1) % config.model.vocab_size
        after = ours(batch).detach()[1].view(B, S, -1)
        assert (after[0, seen] - before[0, seen]).abs().max() > 1e-4
        before = after


def test_a_cut_row_is_the_plain_models_shorter_row(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    """Padding changes nothing: row 0 is cut to 7 tokens, whatever stands behind them; row 1 is whole."""
    config, ours, plain = models
    batch = all_logits_batch(config.model.padded_vocab_size, FIRST_ROW_CUT)
    found = ours(batch).detach()[1].view(B, S, -1)
    torch.testing.assert_close(found[0, :7], plain(batch.input_ids[:1, :7]).logits.detach()[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], plain(batch.input_ids[1:]).logits.detach()[0], rtol=1e-5, atol=1e-5)


def test_samples_of_a_row_do_not_see_each_other(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    """To the bit; and each is what the plain model makes of it alone."""
    config, ours, plain = models
    generator = np.random.default_rng(0)

    def sample(length: int) -> Sample:
        tokens = generator.integers(0, 120, length)
        return Sample(0, tokens, np.zeros(length, bool), 1.0, 1.0, (length,))

    rows = [(sample(5), sample(4), sample(3)), (sample(7), sample(2))]
    packed = collate(rows, S, mask_id=0, padding_id=0)
    places = [(0, 0, 5), (0, 5, 9), (0, 9, 12), (1, 0, 7), (1, 7, 9)]
    every = all_logits_batch(config.model.padded_vocab_size)
    batch = replace(every, input_ids=packed.input_ids, position_ids=packed.position_ids, segments=packed.segments)
    before = ours(batch).detach()[1].view(B, S, -1)
    for changed in places:
        row, first, stop = changed
        alone = plain(batch.input_ids[row : row + 1, first:stop]).logits.detach()[0]
        torch.testing.assert_close(before[row, first:stop], alone, rtol=1e-5, atol=1e-5)
        other = batch.input_ids.clone()
        other[row, first:stop] = (other[row, first:stop] + 1) % config.model.vocab_size
        after = ours(replace(batch, input_ids=other)).detach()[1].view(B, S, -1)
        for row, first, stop in places:
            same = torch.equal(after[row, first:stop], before[row, first:stop])
            assert same == ((row, first, stop) != changed)


def test_positions_come_from_the_batch(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    """Rotary embeddings are relative: shifting all positions changes nothing, shifting half of them does."""
    config, ours, _ = models
    batch = all_logits_batch(config.model.padded_vocab_size)
    before = ours(batch).detach()
    batch.position_ids.add_(100)
    torch.testing.assert_close(ours(batch).detach(), before, rtol=1e-4, atol=1e-4)
    batch.position_ids[:, S // 2 :] += 5
    assert (ours(batch).detach() - before).abs().max() > 1e-3


def test_uniform_logits_cost_ln_v(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    config, ours, _ = models
    weight = ours.stages[-1].head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        log_normaliser, target_logit = ours(all_logits_batch(config.model.padded_vocab_size))
        weight.copy_(kept)
    expected = torch.full_like(target_logit, math.log(config.model.padded_vocab_size))
    torch.testing.assert_close(log_normaliser - target_logit, expected)


def test_initial_weights_are_mitchells(models: tuple[Config, LLaDATransformer, LLaDAModelLM]) -> None:
    """Truncated normal at ±3σ; σ = 1/√d_in, and 1/√(2·d_in·(layer+1)) into the residual stream; norms 1."""
    config, _, _ = models
    model = config.model.model_copy(update={"hidden_size": 256, "ffn_hidden_size": 512})
    weights = InitialWeights(model, seed=1)
    expected = {
        "embedding.weight": 256**-0.5,
        "head.weight": 256**-0.5,
        "decoder.layers.1.self_attention.linear_qkv.weight": 256**-0.5,
        "decoder.layers.1.mlp.linear_fc1.weight": 256**-0.5,
        "decoder.layers.1.self_attention.linear_proj.weight": (2 * 256 * 2) ** -0.5,
        "decoder.layers.0.mlp.linear_fc2.weight": (2 * 512 * 1) ** -0.5,
    }
    for name, sigma in expected.items():
        tensor = weights.read(name)
        # A normal cut at ±3σ has standard deviation 0.98658 σ.
        assert float(tensor.std()) == pytest.approx(0.98658 * sigma, rel=0.01), name
        assert float(tensor.abs().max()) <= 3 * sigma
    assert torch.equal(weights.read("decoder.final_layernorm.weight"), torch.ones(256))


def mlp_in_fp64(recompute: str = "none") -> torch.nn.Module:
    """The first layer's MLP: [S, B, H] → ([S, B, H], no bias)."""
    mlp: torch.nn.Module = transformer(config_with(recompute=recompute)).stages[0].decoder.layers[0].mlp
    return mlp.double()


def hidden_in_fp64() -> Tensor:
    """[S, B, H], wide enough for silu to curve."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(S, B, H, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_mlp_is_swiglu_under_torchs_own_autograd(recompute: str) -> None:
    mlp = mlp_in_fp64(recompute)
    x, x_plain = hidden_in_fp64(), hidden_in_fp64()
    fc1, fc2 = (w.detach().clone().requires_grad_() for w in (mlp.linear_fc1.weight, mlp.linear_fc2.weight))
    gate, up = functional.linear(x_plain, fc1[:F]), functional.linear(x_plain, fc1[F:])
    expected = functional.linear(functional.silu(gate) * up, fc2)
    found, _ = mlp(x)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(cotangent)
    found.backward(cotangent)
    for ours, plain in [(x, x_plain), (mlp.linear_fc1.weight, fc1), (mlp.linear_fc2.weight, fc2)]:
        assert plain.grad is not None
        torch.testing.assert_close(ours.grad, plain.grad)


def test_the_mlps_gradient_is_its_derivative() -> None:
    mlp = mlp_in_fp64()
    assert torch.autograd.gradcheck(lambda x: mlp(x)[0], hidden_in_fp64()[:2, :1])


RECOMPUTE = ["none", "selective", "full"]


def batch_with_a_cut_row() -> Batch:
    return all_logits_batch(config_with().model.padded_vocab_size, FIRST_ROW_CUT)


def loss_of(ours: LLaDATransformer, batch: Batch) -> Tensor:
    log_normaliser, target_logit = ours(batch)
    return (batch.loss_weight * (log_normaliser - target_logit)).sum()


# On a CPU torch's rms_norm is several nodes of the graph. Recomputed, their gradients are added up among themselves
# before the residual's is added: the same sum in another order, whose last bits differ.
@pytest.mark.parametrize(("recompute", "rounding"), [("full", 0), ("selective", 2e-6)])
def test_recomputation_changes_neither_losses_nor_gradients(recompute: str, rounding: float) -> None:
    """Of two micro-batches, added up. Losses to the bit; `rounding` is relative to each tensor's largest gradient."""
    batches = [batch_with_a_cut_row(), all_logits_batch(config_with().model.padded_vocab_size)]
    seen = []
    for ours in (transformer(config_with(recompute=kind)) for kind in ("none", recompute)):
        losses = []
        for batch in batches:
            loss = loss_of(ours, batch)
            loss.backward()
            losses.append(loss.detach())
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        seen.append((torch.stack(losses), gradients))
    (expected, gradients), (losses_again, found) = seen
    assert torch.equal(losses_again, expected)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        again = found[name]
        assert gradient is not None
        assert again is not None
        assert gradient.abs().max() > 0
        assert (again - gradient).abs().max() <= rounding * gradient.abs().max(), name


def kept_for_backward(ours: LLaDATransformer, batch: Batch) -> int:
    """Bytes that autograd holds between forward and backward, weights aside."""
    saved: list[torch.UntypedStorage] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(ours, batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    kept = {storage.data_ptr(): storage.nbytes() for storage in saved}  # what has been dropped since has 0 bytes
    loss.backward()  # through all of it
    return sum(nbytes for pointer, nbytes in kept.items() if pointer not in weights)


def test_recomputation_keeps_less() -> None:
    """Selective: of each layer at least both norms' outputs and the MLP's product less. Full: the layers' inputs."""
    batch = batch_with_a_cut_row()
    kept = {kind: kept_for_backward(transformer(config_with(recompute=kind)), batch) for kind in RECOMPUTE}
    position = B * S * torch.float32.itemsize
    assert kept["none"] - kept["selective"] >= LAYERS * (2 * H + F) * position
    # Beside its input a layer that is not recomputed keeps at least queries, keys, values and both of the gate's sides.
    assert kept["selective"] - kept["full"] >= LAYERS * (2 * H + 2 * F) * position


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_evaluation_is_the_same_whatever_is_recomputed(recompute: str) -> None:
    """Without gradients, before and after a step of training."""
    batch = batch_with_a_cut_row()
    ours = transformer(config_with(recompute=recompute))
    with torch.no_grad():
        expected = transformer(config_with())(batch)
        before = ours(batch)
    loss_of(ours, batch).backward()
    with torch.no_grad():
        after = ours(batch)
    for found in (before, after):
        assert not found.requires_grad
        assert torch.equal(found, expected)
