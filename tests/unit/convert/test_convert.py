"""To and from Hugging Face format, on real files; the oracles are safetensors, transformers and torch."""

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import RELEASED, checkpoint, released_folder, released_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data_tools.train_tokenizer import Kind, train_tokenizer
from llada_train.checkpoint.header import read_header
from llada_train.checkpoint.reader import open_verified
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.schema import ModelConfig
from llada_train.convert import from_hf as from_hf_module
from llada_train.convert import to_hf as to_hf_module
from llada_train.convert.from_hf import HfWeights, from_hf
from llada_train.convert.llada import LLADA
from llada_train.convert.load import load_plain
from llada_train.convert.names import Piece, SpecialTokens
from llada_train.convert.plain import plain_model
from llada_train.convert.to_hf import to_hf
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.model.sizes import tensor_specs

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "vocab_size": 300, "num_heads": 4}
MODELS = [ModelConfig(**SIZES, num_kv_heads=kv_heads) for kv_heads in (4, 2)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["def f(x): return x", "the quick brown fox"]), 300, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """LLaDA-8B-Base's folder, with other sizes, and its tensors; with GQA, as the 1B has it."""
    folder = tmp_path_factory.mktemp("released") / "LLaDA-8B-Base"
    return folder, released_folder(folder, n_kv_heads=2)


@pytest.fixture
def small(tokenizer: Path, tmp_path: Path) -> Path:
    """A small folder to be spoilt, in two shards."""
    folder = tmp_path / "small"
    checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    export(tmp_path / "run", folder, "bf16", max_shard_bytes=50_000)
    return folder


def export(source: Path, out: Path, dtype: str = "bf16", **options: Any) -> dict[str, Tensor]:
    with open_verified(source) as weights:
        to_hf(weights, out, dtype, **options)
    return {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}


def refusal(folder: Path, out: Path) -> str:
    """What from-hf says; and it writes nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        from_hf(folder, out)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_a_sentencepiece_model_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    theirs = train_tokenizer(iter(["def f(x): return x"]), 300, folder, Kind.SENTENCEPIECE_BPE)
    for name, path in (("folder", folder), ("file", folder / "tokenizer.model")):
        checkpoint(tmp_path / f"run-{name}", MODELS[1], path)
        export(tmp_path / f"run-{name}", tmp_path / name)
        ours = Tokenizer.load(tmp_path / name)
        assert (ours.fingerprint, ours.eos_id, ours.mask_id) == (theirs.fingerprint, theirs.eos_id, theirs.mask_id)


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


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_exports_are_the_same_from_every_layout(tensor_parallel: int, tokenizer: Path, tmp_path: Path) -> None:
    """In shards and in chunks that cut tensors anywhere, the tensors that torch cuts out of the global ones."""
    ours = checkpoint(tmp_path / "run", MODELS[0], tokenizer, tensor_parallel)
    seen: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_hf_module, "_CHUNK", 1000)
        found = export(
            tmp_path / "run",
            tmp_path / "new" / "hf",
            "fp32",
            on_progress=lambda *step: seen.append(step),
            max_shard_bytes=50_000,
        )
    qkv = ours["decoder.layers.1.self_attention.linear_qkv.weight"].view(4, 3, 8, 32)
    expected = {
        "wte": ours["embedding.weight"],
        "ff_out": ours["head.weight"],
        "blocks.1.k_proj": qkv[:, 1].flatten(0, 1),
        "blocks.1.v_proj": qkv[:, 2].flatten(0, 1),
        "blocks.0.up_proj": ours["decoder.layers.0.mlp.linear_fc1.weight"][1],
        "blocks.0.ff_out": ours["decoder.layers.0.mlp.linear_fc2.weight"],
    }
    for name, tensor in expected.items():
        assert torch.equal(found[f"model.transformer.{name}.weight"], tensor), name
    size = sum(t.nbytes for t in found.values())
    assert seen[-1] == (size, size) and seen == sorted(seen)
    index = json.loads((tmp_path / "new" / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    for file in set(index["weight_map"].values()):
        names = {name for name, place in index["weight_map"].items() if place == file}
        assert load_file(tmp_path / "new" / "hf" / file).keys() == names
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]


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


def test_bf16_export_rounds_once(tokenizer: Path, tmp_path: Path) -> None:
    ours = checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    export(tmp_path / "run", tmp_path / "hf")
    with HfWeights(tmp_path / "hf") as read:
        for name, tensor in ours.items():
            assert torch.equal(read.read(name), tensor.bfloat16().float())


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


def test_another_models_sizes_are_all_listed(small: Path) -> None:
    other = ModelConfig(**SIZES | {"num_layers": 3, "num_heads": 8}, num_kv_heads=2, rope_theta=1e4)
    with pytest.raises(UserError) as caught:
        HfWeights(small, other)
    for line in ("model.num_layers: 2 → 3", "model.num_heads: 4 → 8", "model.rope_theta: 500000.0 → 10000.0"):
        assert line in str(caught.value)


def test_cut_half_written_and_foreign_folders(small: Path, tmp_path: Path) -> None:
    first, second = sorted(small.glob("model-*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    told = refusal(small, tmp_path / "new")
    assert f"{first.name}: cut or damaged" in told and f"{second.name}: the file is missing" in told
    (small / "model.safetensors.index.json").unlink()
    (small / "tokenizer.json").unlink()
    (small / "config.json").unlink()
    told = refusal(small, tmp_path / "new")
    assert "config.json: no such file" in told and "only safetensors" in told and "no tokenizer" in told
    (small / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    told = refusal(small, tmp_path / "new")
    assert "model_type is 'llama' (['LlamaForCausalLM']), expected 'llada'" in told and "causal" in told
    (small / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../run/rank-00000.safetensors"}}')
    assert "weight_map has to give each tensor the name of a file beside it" in refusal(small, tmp_path / "new")


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
    ids = torch.tensor([[5, 6, 2, 7]])
    assert torch.equal(load_plain(tmp_path / "ours")[0](ids).logits, plain(ids).logits)


def test_what_cannot_be_exported_is_listed_and_nothing_written(tokenizer: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", MODELS[1], tmp_path / "no-tokenizer")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        export(tmp_path / "run", tmp_path / "run", "fp16")
    for line in ("bf16, fp32", "exists already", "no tokenizer"):
        assert line in str(caught.value)
    checkpoint(tmp_path / "sound", MODELS[1], tokenizer)

    def full_disk(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        export(tmp_path / "sound", tmp_path / "hf", on_progress=full_disk)
    with pytest.raises(UserError, match=r"GB of disk, 0\.0 GB are free"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        export(tmp_path / "sound", tmp_path / "hf")
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "sound"]


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_killed_conversion_leaves_no_output_and_may_be_repeated(direction: str, small: Path, tmp_path: Path) -> None:
    def convert(on_progress: Any = lambda done, total: None) -> None:
        if direction == "from-hf":
            from_hf(small, tmp_path / "new", on_progress)
        else:
            export(tmp_path / "run", tmp_path / "new", on_progress=on_progress)

    def die(done: int, total: int) -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=convert, args=(die,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "new").exists() and (tmp_path / "new.partial").exists()
    convert()
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new.partial").exists()


def peak(work: Any, out: Any) -> None:
    """How far resident memory rises, in bytes."""

    def resident(field: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    out.put(resident("VmHWM") - before)


def test_memory_holds_pieces_of_tensors(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions on a model whose two largest tensors are 128 MB each, as fp32."""
    released_folder(tmp_path / "hf", d_model=256, n_layers=1, mask_token_id=2, eos_token_id=1)
    for file in tokenizer.iterdir():  # the released one takes more memory than these weights
        shutil.copy(file, tmp_path / "hf")
    monkeypatch.setattr(from_hf_module, "_CHUNK", 1 << 17)
    monkeypatch.setattr(to_hf_module, "_CHUNK", 1 << 17)
    checkpoint(tmp_path / "run", MODELS[1], tokenizer)  # what is imported and started only once
    export(tmp_path / "run", tmp_path / "first")
    from_hf(tmp_path / "first", tmp_path / "first-back")

    def back() -> None:
        with open_verified(tmp_path / "ours") as weights:
            to_hf(weights, tmp_path / "back")

    fork = multiprocessing.get_context("fork")
    for work in (lambda: from_hf(tmp_path / "hf", tmp_path / "ours"), back):
        results = fork.SimpleQueue()
        child = fork.Process(target=peak, args=(work, results))
        child.start()
        child.join()
        assert results.get() < 64 * 2**20  # buffers and the interpreter (20 to 30 MB): half of one of them


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
