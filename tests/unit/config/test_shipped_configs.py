from pathlib import Path

import pytest

from llada_train.config.load import load_config
from llada_train.data.timeline import Timeline

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_pretrain_configs_load(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sft").glob("*.yaml")), ids=lambda path: path.stem)
def test_sft_configs_load(path: Path) -> None:
    assert load_config(path, world_size=2).command == "sft"


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_configs_load(path: Path) -> None:
    config = load_config(CONFIGS / "pretrain" / "demo.yaml", [f"model={path}", "data.sequence_length=64"])
    assert config.model.vocab_size == config.model.padded_vocab_size  # no rows that no token uses


def test_the_8b_recipe_is_the_papers() -> None:
    config = load_config(CONFIGS / "pretrain" / "llada_8b.yaml", world_size=256)
    tokens_per_step = config.training.global_batch_size * config.data.sequence_length
    assert tokens_per_step == 5_242_880
    assert config.optimizer.learning_rate[0].until_tokens == 2000 * tokens_per_step
    assert Timeline(config).end_samples // config.training.global_batch_size == 438_691  # 2.3T tokens, whole steps
    assert sum(corpus.weight for corpus in config.data.corpora) == pytest.approx(1)


def test_the_demo_runs_on_two_processes() -> None:
    load_config(CONFIGS / "pretrain" / "demo.yaml", world_size=2)
