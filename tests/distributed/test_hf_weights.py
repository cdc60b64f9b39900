"""A Hugging Face folder goes into a layout, and comes out of it, as it was."""

from collections.abc import Callable
from pathlib import Path

import hf_weights
import processes
import pytest
import torch
from hf_folders import checkpoint
from safetensors.torch import load_file

from llada_train.checkpoint.reader import open_verified
from llada_train.config.schema import ModelConfig
from llada_train.convert.to_hf import to_hf
from llada_train.model.hf.modeling_llada import LLaDAModelLM

IDS = [3, 70, 2, 2, 299, 17, 2, 8]
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 300,
    "max_sequence_length": 64,
}


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 export."""
    path = tmp_path_factory.mktemp("hf")
    checkpoint(path / "run", ModelConfig(**MODEL), tiny_data / "tokenizer")
    with open_verified(path / "run") as weights:
        to_hf(weights, path / "hf", "fp32", max_shard_bytes=50_000)
    return path / "hf"


@pytest.mark.parametrize(
    "layout",
    [
        ["tensor_parallel=2", "pipeline_parallel=2"],
        ["tensor_parallel=2", "sequence_parallel=true", "zero_stage=3"],
    ],
    ids=["TP2-PP2", "TP2-SP-DP2-ZeRO3"],
)
def test_weights_and_logits_through_a_layout(
    layout: list[str], folder: Path, make_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(**{f"model__{key}": value for key, value in MODEL.items()})
    overrides = [f"parallel.{setting}" for setting in layout]
    found = processes.run(4, hf_weights.import_and_save, config, overrides, folder, IDS, tmp_path / "checkpoints")
    with open_verified(tmp_path / "checkpoints" / "step-00000000") as weights:
        to_hf(weights, tmp_path / "back", "fp32", max_shard_bytes=50_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "back").glob("*.safetensors")) and len(files) > 1
    for name in files:
        expected, back = load_file(folder / name), load_file(tmp_path / "back" / name)
        assert expected.keys() == back.keys()
        assert all(torch.equal(tensor, back[tensor_name]) for tensor_name, tensor in expected.items())
    model = LLaDAModelLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        expected_logits = model(torch.tensor([IDS])).logits[0]
    with_head = [rank.logits for rank in found if rank.logits is not None]
    assert len(with_head) == (2 if "pipeline_parallel=2" in layout else 4)
    for logits in with_head:
        torch.testing.assert_close(torch.from_numpy(logits), expected_logits, rtol=1e-5, atol=1e-5)
    if "pipeline_parallel=2" in layout:  # no rank reads the whole
        assert all(("head.weight" in rank.read) != ("embedding.weight" in rank.read) for rank in found)
