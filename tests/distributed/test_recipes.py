"""Every shipped recipe trains a step: its own layout and settings, with a small model, short rows and few of them."""

from pathlib import Path

import processes
import pytest
from conftest import ROOT
from training_run import train

RECIPES = sorted((ROOT / "configs").glob("pretrain/*.yaml")) + sorted((ROOT / "configs").glob("sft/*.yaml"))
SMALL_MODEL = "{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 96, vocab_size: 300}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_step_of_each_recipe(tiny_data: Path, tmp_path: Path, recipe: Path) -> None:
    corpus = "pairs.jsonl" if recipe.parent.name == "sft" else "corpus"
    small = [
        "init_from=null",
        f"run_dir={tmp_path}/run",
        f"model={SMALL_MODEL}",
        f"data.tokenizer={tiny_data}/tokenizer",
        f"data.corpora=[{{path: {tiny_data}/{corpus}, validation_documents: 20}}]",
        "data.sequence_length=64",
        "training.global_batch_size=8",
        "training.micro_batch_size=2",
        "validation.sequences=4",
    ]
    small += ["validation.answers=4"] if recipe.parent.name == "sft" else []
    first, second = processes.run(2, train, recipe, small, 1, tmp_path / "checkpoints", None)
    assert first.losses == second.losses and 0 < first.losses[0] < 20 and 0 < first.validation < 20
