"""The table of names, which serves both directions; the oracles are the released names, torch and safetensors."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import (
    MODELS,
    RELEASED,
    checkpoint,
    export,
    released_tensors,
    small_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.checkpoint.reader import open_verified
from llada_train.config.schema import ModelConfig
from llada_train.convert import from_hf as from_hf_module
from llada_train.convert.from_hf import HfWeights
from llada_train.convert.llada import LLADA
from llada_train.convert.names import Piece, SpecialTokens
from llada_train.convert.plain import plain_model
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.model.sizes import tensor_specs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder)
    return folder


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"kv{m.num_kv_heads}")
def test_table_names_every_tensor_of_the_released_format(model: ModelConfig) -> None:
    sizes = RELEASED | {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": model.num_kv_heads}
    expected = released_tensors(sizes | {"mlp_hidden_size": 48, "embedding_size": 384})
    pieces = LLADA.pieces(model)
    assert {name: piece.shape for name, piece in pieces.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    for name, spec in tensor_specs(model).items():  # every element once
        runs = sorted(run for piece in pieces.values() if piece.name == name for run in piece.runs)
        assert runs[0][0] == 0 and sum(length for _, length in runs) == spec.numel
        assert all(a + length == b for (a, length), (b, _) in pairwise(runs))


@given(group=st.integers(1, 4), kv_heads=st.integers(1, 4), half=st.integers(1, 3))
@settings(deadline=None)
def test_qkv_is_query_heads_key_value_of_each_group(group: int, kv_heads: int, half: int) -> None:
    heads, d = group * kv_heads, 2 * half
    sizes = {"num_layers": 1, "hidden_size": heads * d, "ffn_hidden_size": 3, "vocab_size": 8}
    model = ModelConfig(**sizes, num_heads=heads, num_kv_heads=kv_heads)
    q, k, v = torch.randn(heads, d, heads * d), *torch.randn(2, kv_heads, d, heads * d)
    by_hand = torch.cat([torch.cat([*q[g * group : (g + 1) * group], k[g], v[g]]) for g in range(kv_heads)]).flatten()
    for letter, expected in zip("qkv", (q, k, v), strict=True):
        piece = LLADA.pieces(model)[f"model.transformer.blocks.0.{letter}_proj.weight"]
        assert piece.name == "decoder.layers.0.self_attention.linear_qkv.weight"
        found = torch.cat([by_hand[start : start + length] for start, length in piece.runs])
        assert torch.equal(found.view(piece.shape), expected.flatten(0, 1))


def test_fc1_is_gate_then_up() -> None:
    pieces, size = LLADA.pieces(MODELS[0]), 48 * 32
    name = "model.transformer.blocks.1.{}.weight"
    assert pieces[name.format("ff_proj")] == Piece("decoder.layers.1.mlp.linear_fc1.weight", (48, 32), [(0, size)])
    assert pieces[name.format("up_proj")].runs == [(size, size)]


class ToyConfig(LLaDAConfig):
    model_type = "toy"


class Toy:
    """A family in one place: a llama's names, tensors of its own shape, another config."""

    model_type = "toy"
    code = ()

    def pieces(self, model: ModelConfig) -> dict[str, Piece]:
        names = {"wte": "embed_tokens", "blocks": "layers", "ff_out": "down_proj"}
        return {
            ".".join(names.get(part, part) for part in name.removeprefix("model.transformer.").split(".")): piece
            for name, piece in LLADA.pieces(model).items()
        }

    def hf_config(self, model: ModelConfig, tokens: SpecialTokens) -> Any:
        return ToyConfig(**LLADA.hf_config(model, tokens).to_diff_dict())

    def model_config(self, tree: dict[str, Any]) -> ModelConfig:
        return LLADA.model_config(tree)


def test_a_family_is_one_table(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    found = export(tmp_path / "run", tmp_path / "toy", "fp32", family=Toy())
    assert "layers.1.down_proj.weight" in found and not (tmp_path / "toy" / "modeling_llada.py").exists()
    monkeypatch.setitem(from_hf_module.FAMILIES, "toy", Toy())
    with HfWeights(tmp_path / "toy") as read:
        assert all(torch.equal(read.read(name), tensor) for name, tensor in ours.items())


def test_plain_model_has_the_tables_tensors(tokenizer: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    found = export(tmp_path / "run", tmp_path / "hf", "fp32")
    with open_verified(tmp_path / "run") as weights:
        plain = plain_model(weights, weights.model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.state_dict().items())
    with torch.device("meta"):
        names = LLaDAModelLM(LLaDAConfig.from_pretrained(tmp_path / "hf")).state_dict().keys()
    assert found.keys() == names
