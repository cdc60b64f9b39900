"""From checkpoints to Hugging Face format, on real files; the oracles are safetensors and torch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_folders import (
    MODELS,
    SIZES,
    checkpoint,
    export,
    small_tokenizer,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from data_tools.train_tokenizer import Kind, train_tokenizer
from llada_train.checkpoint.manifest import Progress, read_manifest
from llada_train.cli import app
from llada_train.config.errors import UserError
from llada_train.config.schema import Config, ModelConfig
from llada_train.convert import to_hf as to_hf_module
from llada_train.convert.card import model_card
from llada_train.convert.from_hf import HfWeights
from llada_train.data.timeline import Timeline
from llada_train.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder)
    return folder


def test_a_sentencepiece_model_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    theirs = train_tokenizer(iter(["def f(x): return x"]), 300, folder, Kind.SENTENCEPIECE_BPE)
    for name, path in (("folder", folder), ("file", folder / "tokenizer.model")):
        checkpoint(tmp_path / f"run-{name}", MODELS[1], path)
        export(tmp_path / f"run-{name}", tmp_path / name)
        ours = Tokenizer.load(tmp_path / name)
        assert (ours.fingerprint, ours.eos_id, ours.mask_id) == (theirs.fingerprint, theirs.eos_id, theirs.mask_id)


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


def test_bf16_export_rounds_once(tokenizer: Path, tmp_path: Path) -> None:
    ours = checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    export(tmp_path / "run", tmp_path / "hf")
    with HfWeights(tmp_path / "hf") as read:
        for name, tensor in ours.items():
            assert torch.equal(read.read(name), tensor.bfloat16().float())


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


def test_the_card_has_the_facts_of_a_run_that_changed_on_its_way(tokenizer: Path, tmp_path: Path) -> None:
    """256 tokens at 3 : 1 in batches of 4 × 16, then 512 at 1 : 1 in batches of 8 × 8."""
    checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    manifest = read_manifest(tmp_path / "run")
    tree = manifest.config.model_dump()
    tree["data"]["corpora"] = [{"path": "web/train", "weight": 3}, {"path": "code/train"}]
    change = {"from_tokens": 256, "global_batch_size": 8, "sequence_length": 8, "weights": {"web/train": 1}}
    tree["schedule"] = [change]
    config = Config.model_validate(tree)
    phases = Timeline(config).begun(80)
    progress = Progress(step=12, consumed_samples=80, phases=phases)
    card = model_card("mine", manifest.model_copy(update={"config": config, "progress": progress}), "bf16")
    for row in (
        "| parameters | 40,096 |",
        "| heads, key-value heads | 4, 2 |",
        "| vocabulary | 300 ids, 384 rows |",
        "| steps | 12 |",
        "| tokens (nominal) | 768 |",
        "| sequences | 80 of 16, then 8 tokens |",
        "| batch | 4, then 8 sequences |",
        "| corpora | web/train 58.3 %, code/train 41.7 % |",
        "| began from | LLaDA's initialisation |",
        'from_pretrained("mine", trust_remote_code=True)',
    ):
        assert row in card, row


def test_what_is_told_before_the_checkpoint_is_compared(tokenizer: Path, tmp_path: Path) -> None:
    """Comparing takes minutes for a large one."""
    checkpoint(tmp_path / "run", MODELS[1], tokenizer)
    data = next((tmp_path / "run").glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    for out, words in ((tmp_path, "exists already"), (tmp_path / "hf", "checksum differs")):
        done = CliRunner().invoke(app, ["convert", "to-hf", str(tmp_path / "run"), str(out)])
        assert isinstance(done.exception, UserError) and words in str(done.exception)
    other = tmp_path / "other"
    train_tokenizer(iter(["def f(x): return x", "the quick brown fox"] * 9), 320, other, Kind.SENTENCEPIECE_BPE)
    checkpoint(tmp_path / "run-2", ModelConfig(**SIZES | {"vocab_size": 270}, num_kv_heads=2), other)
    with pytest.raises(UserError, match="not the tokenizer that the model was trained with"):
        export(tmp_path / "run-2", tmp_path / "hf")
