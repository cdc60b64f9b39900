"""From Hugging Face format, on real files: what a folder has, and all that can be wrong with one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import (
    MODELS,
    RELEASED,
    SIZES,
    export,
    exported_folder,
    released_folder,
    small_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llada_train.checkpoint.header import read_header
from llada_train.checkpoint.reader import open_verified
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.schema import ModelConfig
from llada_train.convert import from_hf as from_hf_module
from llada_train.convert.from_hf import HfWeights, from_hf
from llada_train.convert.llada import LLADA
from llada_train.convert.load import load_plain
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.sizes import slice_runs, tensor_specs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """LLaDA-8B-Base's folder, with other sizes, and its tensors; with GQA, as the 1B has it."""
    folder = tmp_path_factory.mktemp("released") / "LLaDA-8B-Base"
    return folder, released_folder(folder, n_kv_heads=2)


@pytest.fixture
def small(tokenizer: Path, tmp_path: Path) -> Path:
    """A small folder to be spoilt, in two shards."""
    return exported_folder(tmp_path, tokenizer)


def refusal(folder: Path, out: Path) -> str:
    """What from-hf says; and it writes nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        from_hf(folder, out)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_a_released_folder_comes_back_bit_for_bit(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Tensors, config.json, ids and chat template; read in chunks that cut tensors anywhere."""
    folder, tensors = base
    seen: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_hf_module, "_CHUNK", 100_003)
        patch.setattr(from_hf_module, "_FILE_BYTES", 10**7)
        model = from_hf(folder, tmp_path / "ours", lambda *step: seen.append(step))
    assert seen[-1] == (4 * sum(t.numel() for t in tensors.values()),) * 2
    assert len(list((tmp_path / "ours").glob("weights-*.safetensors"))) == 2
    found = export(tmp_path / "ours", tmp_path / "back")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor), name
    given, back = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert {key: back.get(key) for key in RELEASED} == {key: given[key] for key in RELEASED}
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (126080, 126081)
    talk = [{"role": "user", "content": " Hi "}]
    theirs, ours = (PreTrainedTokenizerFast.from_pretrained(path) for path in (folder, tmp_path / "back"))
    assert ours.apply_chat_template(talk)["input_ids"] == theirs.apply_chat_template(talk)["input_ids"]
    loaded = Tokenizer.load(tmp_path / "back")
    assert (loaded.mask_id, loaded.eos_id, loaded.vocab_size) == (126336, 126081, 126349)
    assert "imported from `LLaDA-8B-Base`" in (tmp_path / "back" / "README.md").read_text()
    assert (model.padded_vocab_size, model.num_kv_heads) == (126464, 2)
    with (
        open_verified(tmp_path / "ours") as weights,
        pytest.raises(UserError, match="imported from LLaDA-8B-Base"),
    ):
        _ = weights.config


def test_the_model_file_is_a_section_of_a_config(
    base: tuple[Path, dict[str, Tensor]], tmp_path: Path, make_config: Any
) -> None:
    model = from_hf(base[0], tmp_path / "ours")
    config = load_config(make_config(), [f"model={tmp_path / 'ours' / 'model.yaml'}", "parallel.tensor_parallel=1"])
    assert config.model == model


def test_a_run_may_know_fewer_ids_than_there_are_rows(base: tuple[Path, dict[str, Tensor]]) -> None:
    with HfWeights(base[0]) as weights:
        model = weights.model.model_copy(update={"vocab_size": 126_349})
    with HfWeights(base[0], model) as weights:
        assert torch.equal(weights.read("head.weight"), base[1]["model.transformer.ff_out.weight"].float())
        fc1 = [base[1][f"model.transformer.blocks.3.{name}_proj.weight"].float() for name in ("ff", "up")]
        assert torch.equal(weights.read("decoder.layers.3.mlp.linear_fc1.weight"), torch.stack(fc1))


def test_ranges_of_a_tensor_are_read_by_themselves(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices of every layout, and ranges anywhere, in chunks that cut them anywhere."""
    with HfWeights(small) as weights:
        whole = {name: weights.read(name).flatten() for name in weights.names()}
        monkeypatch.setattr(from_hf_module, "_CHUNK", 97)
        for name, spec in tensor_specs(weights.model).items():
            cases = [slice_runs(spec, index, 2) for index in range(2)] if spec.partition_dim is not None else []
            for runs in [*cases, [(5, 0), (7, 13), (spec.numel - 3, 3), (0, spec.numel)]]:
                expected = torch.cat([whole[name][start : start + length] for start, length in runs])
                assert torch.equal(weights.read_runs(name, runs), expected), name
            assert torch.equal(torch.cat(list(weights.chunks(name))), whole[name])


def test_the_shipped_8b_is_the_released_one(base: tuple[Path, dict[str, Tensor]]) -> None:
    shipped = YAML(typ="safe").load(Path(__file__).parents[3] / "configs" / "model" / "llada_8b.yaml")
    assert ModelConfig.model_validate(shipped) == LLADA.model_config(RELEASED)


def test_other_special_tokens_than_the_runs_are_refused(small: Path, tokenizer: Path, tmp_path: Path) -> None:
    """A run's tokenizer is not the folder's; and a folder's own has to be that of its config."""
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"mask_token_id": 7, "eos_token_id": 9, "n_kv_heads": 4}))
    with pytest.raises(UserError) as caught:
        HfWeights(small, MODELS[1], Tokenizer.load(tokenizer))
    for line in ("mask_token_id is 7, but the tokenizer's is 2", "eos_token_id is 9", "model.num_kv_heads: 4 → 2"):
        assert line in str(caught.value)
    (small / "config.json").write_text(json.dumps(config | {"mask_token_id": 7}))
    with pytest.raises(UserError, match="mask_token_id is 7"):
        load_plain(small)


def test_all_that_is_wrong_is_listed_at_once(small: Path, tmp_path: Path) -> None:
    index = json.loads((small / "model.safetensors.index.json").read_text())
    home = {name: small / file for name, file in index["weight_map"].items()}
    prefix = "model.transformer."
    for name, change in {
        "blocks.0.k_proj.weight": lambda t: None,
        "ln_f.weight": lambda t: t[:31],
        "blocks.1.ff_out.weight": lambda t: t.to(torch.float64),
        "blocks.1.attn_norm.weight": lambda t: t.to(torch.int16),
    }.items():
        tensors = load_file(home[prefix + name])
        tensor = change(tensors.pop(prefix + name))
        save_file(tensors | ({} if tensor is None else {prefix + name: tensor}), home[prefix + name])
    file = home[f"{prefix}wte.weight"]
    save_file(load_file(file) | {f"{prefix}wpe.weight": torch.ones(3)}, file)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"mask_token_id": 7, "rope": False, "weight_tying": True}))
    told = refusal(small, tmp_path / "run")
    for line in (
        "exists already",
        "mask_token_id is 7",
        "rope is False",
        "weight_tying is True",
        "wpe.weight: in ",
    ):
        assert line in told, told
    (small / "config.json").write_text(json.dumps(config))
    told = refusal(small, tmp_path / "new")
    for line in (
        "blocks.0.k_proj.weight: missing",
        "ln_f.weight: shape [31], by config.json [32]",
        "blocks.1.ff_out.weight: dtype F64",
        "blocks.1.attn_norm.weight: dtype I16",
        "wpe.weight: not a tensor of the model",
    ):
        assert line in told, told
    assert "6 problems" in told


def test_config_that_disagrees_with_the_weights(small: Path, tmp_path: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"n_kv_heads": 4, "n_layers": 3, "mlp_hidden_size": 40}))
    told = refusal(small, tmp_path / "new")
    assert "blocks.1.k_proj.weight: shape [16, 32], by config.json [32, 32]" in told
    assert "blocks.2.attn_norm.weight: missing" in told and "ff_proj.weight: shape [48, 32]" in told
    bad = {"n_heads": 3, "d_model": "wide", "rope_theta": None, "embedding_size": 300}
    (small / "config.json").write_text(json.dumps(config | bad))
    told = refusal(small, tmp_path / "new")
    assert "d_model: Input should be a valid integer" in told and "rope_theta: missing" in told
    bad = {"rope_scaling": {"type": "linear", "factor": 2}, "tie_word_embeddings": True, "rms_norm_eps": math.inf}
    (small / "config.json").write_text(json.dumps(config | bad))
    told = refusal(small, tmp_path / "new")
    assert "rope_scaling is {" in told and "tie_word_embeddings is True" in told and "finite number" in told
    (small / "config.json").write_text(
        json.dumps(config | {"n_layers": 10**12})
    )  # told at once, without a table of them
    assert "1,000,000,000,000 layers, but 21 tensors" in refusal(small, tmp_path / "new")


def test_another_models_sizes_are_all_listed(small: Path) -> None:
    other = ModelConfig(**SIZES | {"num_layers": 3, "num_heads": 8}, num_kv_heads=2, rope_theta=1e4)
    with pytest.raises(UserError) as caught:
        HfWeights(small, other)
    for line in ("model.num_layers: 2 → 3", "model.num_heads: 4 → 8", "model.rope_theta: 500000.0 → 10000.0"):
        assert line in str(caught.value)


def test_cut_half_written_and_foreign_folders(
    small: Path, base: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    first, second = sorted(small.glob("model-*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    told = refusal(small, tmp_path / "new")
    assert f"{first.name}: cut or damaged" in told and f"{second.name}: the file is missing" in told
    assert "blocks.0" not in told  # a file says enough, its tensors need not be listed as well
    (small / "model.safetensors").touch()
    assert "model.safetensors.index.json: which of the two is meant?" in refusal(small, tmp_path / "new")
    (small / "model.safetensors").unlink()
    (small / "model.safetensors.index.json").unlink()
    (small / "tokenizer.json").unlink()
    (small / "config.json").unlink()
    told = refusal(small, tmp_path / "new")
    assert "config.json: no such file" in told and "only safetensors" in told and "no tokenizer" in told
    (small / "adapter_config.json").touch()
    assert "an adapter; merge it" in refusal(small, tmp_path / "new")
    assert f"begin a run with init_from={tmp_path / 'run'}" in refusal(tmp_path / "run", tmp_path / "new")
    with pytest.raises(UserError, match="a Hugging Face folder; give a run"), open_verified(base[0]):
        pass
    (small / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    told = refusal(small, tmp_path / "new")
    assert "model_type is 'llama' (['LlamaForCausalLM']), expected 'llada'" in told and "causal" in told
    (small / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../run/rank-00000.safetensors"}}')
    assert "weight_map has to give each tensor the name of a file beside it" in refusal(small, tmp_path / "new")
    (small / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "weight_map has to give" in refusal(small, tmp_path / "new")


@given(content=st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
@settings(max_examples=25, deadline=None)
def test_any_file_in_place_of_config_or_weights_is_a_users_mistake(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = content.encode() if isinstance(content, str) else content
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(data)
    with pytest.raises(UserError):
        from_hf(folder, folder / "out")
    (folder / "config.json").write_text(json.dumps(RELEASED | {"n_layers": 1, "rms_norm_eps": str(content)}))
    with pytest.raises(UserError):
        HfWeights(folder)


def test_headers_are_read_as_safetensors_does(small: Path) -> None:
    for path in small.glob("*.safetensors"):
        with path.open("rb") as file:
            header = read_header(file)
            for name, tensor in load_file(path).items():
                file.seek(header[name].start)
                assert file.read(tensor.nbytes) == tensor.view(torch.uint8).numpy().tobytes()


def test_code_in_the_folder_is_never_run(small: Path, tmp_path: Path) -> None:
    for name in ("modeling_llada.py", "configuration_llada.py", "tokenization_llada.py", "__init__.py"):
        (small / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((small / "tokenizer_config.json").read_text())
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_llada.LLaDATokenizer", None]}}
    (small / "tokenizer_config.json").write_text(json.dumps(config | auto))
    from_hf(small, tmp_path / "ours")
    plain, _ = load_plain(small)
    export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "ran").exists()
    assert "open(" not in (tmp_path / "back" / "modeling_llada.py").read_text()
    assert "auto_map" not in json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    ids = torch.tensor([[5, 6, 2, 7]])
    assert torch.equal(load_plain(tmp_path / "ours")[0](ids).logits, plain(ids).logits)
