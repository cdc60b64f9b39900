"""An exported folder in transformers: what users do with it, in a process that does not know this project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_folders import checkpoint

from data_tools.train_tokenizer import train_tokenizer
from llada_train.checkpoint.reader import open_verified
from llada_train.config.schema import ModelConfig
from llada_train.convert.plain import plain_model
from llada_train.convert.to_hf import to_hf

OLD = "LLADA_TRAIN_TRANSFORMERS_4"  # a Python with torch, transformers 4, peft and accelerate
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    vocab_size=300,
    max_sequence_length=64,
)


@pytest.mark.parametrize(
    "interpreter",
    [
        pytest.param(sys.executable, id="transformers-5"),
        pytest.param(
            os.environ.get(OLD),
            id="transformers-4",
            marks=pytest.mark.skipif(OLD not in os.environ, reason=f"{OLD} names no Python with transformers 4"),
        ),
    ],
)
def test_features_of_an_export(interpreter: str, tmp_path: Path) -> None:
    train_tokenizer(iter(["def f(x): return x", "the quick brown fox"]), 300, tmp_path / "tokenizer")
    checkpoint(tmp_path / "run", MODEL, tmp_path / "tokenizer")
    with open_verified(tmp_path / "run") as weights:
        to_hf(weights, tmp_path / "hf", "fp32")
        plain = plain_model(weights, MODEL)
    script = Path(__file__).parent / "exported_features.py"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [interpreter, "-I", "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = plain(torch.load(tmp_path / "ids.pt")).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=1e-6, atol=1e-6)
