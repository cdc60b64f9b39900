import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from data_tools.train_tokenizer import Kind, train_tokenizer
from llada_train.config.errors import UserError
from llada_train.config.schema import Config, ModelConfig
from llada_train.convert.from_hf import HfWeights
from llada_train.convert.names import hf_names, hf_shapes, join, our_names, split
from llada_train.convert.plain import plain_model
from llada_train.convert.to_hf import to_hf
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.model.sizes import tensor_specs

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "vocab_size": 300}
MODELS = [ModelConfig(**SIZES, num_heads=4, num_kv_heads=kv_heads) for kv_heads in (4, 2, 1)]


class RandomWeights:
    """A stand-in for a checkpoint: every tensor drawn from a normal distribution."""

    def __init__(self, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(spec.shape, generator=generator) for name, spec in tensor_specs(model).items()
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["def f(x): return x", "the quick brown fox"]), 300, folder)
    return folder


def config_of(model: ModelConfig, tokenizer: Path) -> Config:
    return Config(
        run_dir="run",
        model=model,
        data={"tokenizer": tokenizer, "sequence_length": 16, "corpora": [{"path": "corpus"}]},
        optimizer={"learning_rate": [{"until_tokens": 1000, "end": 1e-3}]},
        training={"global_batch_size": 2, "micro_batch_size": 1},
    )


@pytest.fixture
def exported(tokenizer: Path, tmp_path: Path) -> Path:
    model = MODELS[1]
    to_hf(RandomWeights(model), config_of(model, tokenizer), tmp_path / "hf", "fp32")
    return tmp_path / "hf"


def test_a_sentencepiece_model_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    theirs = train_tokenizer(iter(["def f(x): return x"]), 300, folder, Kind.SENTENCEPIECE_BPE)
    for name, path in (("folder", folder), ("file", folder / "tokenizer.model")):
        to_hf(RandomWeights(MODELS[1]), config_of(MODELS[1], path), tmp_path / name, "fp32")
        ours = Tokenizer.load(tmp_path / name)
        assert (ours.fingerprint, ours.eos_id, ours.mask_id) == (theirs.fingerprint, theirs.eos_id, theirs.mask_id)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"kv{m.num_kv_heads}")
def test_table_names_every_tensor_of_the_released_format(model: ModelConfig) -> None:
    config = LLaDAConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=model.num_kv_heads, mlp_hidden_size=48, vocab_size=384
    )
    with torch.device("meta"):
        plain = LLaDAModelLM(config).state_dict()
    assert hf_shapes(model) == {name: tuple(tensor.shape) for name, tensor in plain.items()}
    for theirs, (ours, piece) in our_names(model).items():
        assert hf_names(ours)[piece] == theirs


@given(group=st.integers(1, 4), kv_heads=st.integers(1, 4), half=st.integers(1, 3), layer=st.integers(0, 40))
@settings(deadline=None)
def test_qkv_is_query_heads_key_value_of_each_group(group: int, kv_heads: int, half: int, layer: int) -> None:
    heads, d = group * kv_heads, 2 * half
    model = ModelConfig(
        num_layers=1, hidden_size=heads * d, num_heads=heads, num_kv_heads=kv_heads, ffn_hidden_size=3, vocab_size=8
    )
    name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
    assert hf_names(name) == tuple(f"model.transformer.blocks.{layer}.{x}_proj.weight" for x in "qkv")
    q, k, v = torch.randn(heads, d, heads * d), *torch.randn(2, kv_heads, d, heads * d)
    by_hand = torch.cat([torch.cat([*q[g * group : (g + 1) * group], k[g], v[g]]) for g in range(kv_heads)])
    pieces = [x.flatten(0, 1) for x in (q, k, v)]
    assert torch.equal(join(name, pieces, model), by_hand)
    for got, expected in zip(split(name, by_hand, model), pieces, strict=True):
        assert torch.equal(got, expected)


def test_fc1_is_gate_then_up() -> None:
    gate, up = torch.randn(2, 48, 32)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert [n.split(".")[-2] for n in hf_names(name)] == ["ff_proj", "up_proj"]
    assert torch.equal(join(name, [gate, up], MODELS[0]), torch.stack([gate, up]))


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"kv{m.num_kv_heads}")
def test_round_trip_is_bit_identical(model: ModelConfig, shard_bytes: int, tokenizer: Path, tmp_path: Path) -> None:
    weights, seen = RandomWeights(model), []
    to_hf(
        weights,
        config_of(model, tokenizer),
        tmp_path / "new" / "hf",
        "fp32",
        lambda *step: seen.append(step),
        shard_bytes,
    )
    with HfWeights(tmp_path / "new" / "hf", model) as read:
        assert read.names() == weights.names()
        for name in weights.names():
            assert torch.equal(read.read(name), weights.read(name)), name
    assert seen == [(i, 21) for i in range(1, 22)]
    sizes = [file.stat().st_size for file in (tmp_path / "new" / "hf").glob("*.safetensors")]
    assert (len(sizes) == 1) == (shard_bytes == 10**9)
    assert max(sizes) < shard_bytes + 4096  # the header's room
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]


def test_bf16_export_rounds_once(tokenizer: Path, tmp_path: Path) -> None:
    weights = RandomWeights(MODELS[1])
    to_hf(weights, config_of(MODELS[1], tokenizer), tmp_path / "hf")
    with HfWeights(tmp_path / "hf", MODELS[1]) as read:
        for name in weights.names():
            assert torch.equal(read.read(name), weights.read(name).bfloat16().float())


def test_transformers_loads_the_export(exported: Path, tokenizer: Path) -> None:
    ids = torch.tensor([[5, 6, 2, 7]])
    expected = plain_model(RandomWeights(MODELS[1]), MODELS[1])(ids).logits
    script = f"""
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("hf")
assert tokenizer.mask_token_id == model.config.mask_token_id, tokenizer.mask_token_id
assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.pad_token_id
assert tokenizer.decode(tokenizer("return x").input_ids) == "return x"
assert not any(name.startswith("llada_train") for name in sys.modules)
save_file({{"logits": model(torch.tensor({ids.tolist()})).logits.detach()}}, "logits.safetensors")
"""
    environment = os.environ | {"HF_HOME": str(exported.parent / "cache")}
    subprocess.run([sys.executable, "-I", "-c", script], cwd=exported.parent, env=environment, check=True)
    assert torch.equal(load_file(exported.parent / "logits.safetensors")["logits"], expected)
    assert AutoTokenizer.from_pretrained(exported).mask_token_id == 2
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 1


def test_existing_output_is_refused_and_kept(exported: Path, tokenizer: Path) -> None:
    before = sorted(exported.iterdir())
    with pytest.raises(UserError, match="exists already"):
        to_hf(RandomWeights(MODELS[1]), config_of(MODELS[1], tokenizer), exported)
    assert sorted(exported.iterdir()) == before


def test_unknown_dtype_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bf16, fp32"):
        to_hf(RandomWeights(MODELS[1]), config_of(MODELS[1], tokenizer), tmp_path / "hf", "fp16")


def test_failed_export_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    class Broken(RandomWeights):
        def read(self, name: str) -> Tensor:
            if name == "head.weight":
                raise OSError("No space left on device")
            return super().read(name)

    with pytest.raises(UserError, match="No space left"):
        to_hf(Broken(MODELS[0]), config_of(MODELS[0], tokenizer), tmp_path / "hf", max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_another_models_sizes_are_all_listed(exported: Path) -> None:
    other = ModelConfig(**SIZES | {"num_layers": 3}, num_heads=8, num_kv_heads=2, rope_theta=1e4)
    with pytest.raises(UserError) as caught:
        HfWeights(exported, other)
    for line in ("n_layers is 2, model.num_layers asks for 3", "n_heads is 4", "rope_theta is 500000.0"):
        assert line in str(caught.value)


def test_wrong_missing_and_foreign_tensors_are_all_listed(exported: Path) -> None:
    file = exported / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.transformer.blocks.1.k_proj.weight"]
    tensors["model.transformer.ln_f.weight"] = torch.ones(31)
    tensors["model.transformer.wpe.weight"] = torch.ones(3)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        HfWeights(exported, MODELS[1])
    for line in ("blocks.1.k_proj.weight: missing", "ln_f.weight: shape [31]", "wpe.weight: not a tensor"):
        assert line in str(caught.value)


def test_unreadable_folders(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        HfWeights(tmp_path / "nowhere", MODELS[1])
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        HfWeights(exported, MODELS[1])
    file.unlink()
    with pytest.raises(UserError, match="only safetensors"):
        HfWeights(exported, MODELS[1])
    (exported / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama', expected 'llada'"):
        HfWeights(exported, MODELS[1])
    (exported / "config.json").write_text('{"model_type": "llada", "alibi": true}')
    with pytest.raises(UserError, match="alibi"):
        HfWeights(exported, MODELS[1])
