import math
from pathlib import Path

import pytest

from llada_train.config.load import load_config
from llada_train.data.sft import phases_in_tokens
from llada_train.data.timeline import Timeline
from llada_train.model.sizes import non_embedding_parameter_count, parameter_count
from llada_train.plan.chips import chip_called
from llada_train.plan.plan import Machine, make_plan
from llada_train.plan.search import search

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_pretrain_configs_load(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sft").glob("*.yaml")), ids=lambda path: path.stem)
def test_sft_configs_load(path: Path) -> None:
    assert load_config(path, world_size=2).command == "sft"


@pytest.mark.parametrize(
    ("name", "parameters", "others"),
    [
        ("llada_8b", 8_015_581_184, 6_979_588_096),  # the paper's Tab. 5: 8.02B, 6.98B
        ("llada_1b", 1_487_243_264, 969_246_720),  # 1.49B, 0.97B
        ("llada_100m", 149_441_280, 99_109_632),
        ("tiny", 254_528, 188_992),
    ],
)
def test_model_configs_have_their_parameters(name: str, parameters: int, others: int) -> None:
    """All, and all but embedding and head."""
    path = CONFIGS / "model" / f"{name}.yaml"
    model = load_config(CONFIGS / "pretrain" / "demo.yaml", [f"model={path}", "data.sequence_length=64"]).model
    assert (parameter_count(model), non_embedding_parameter_count(model)) == (parameters, others)
    assert model.vocab_size == model.padded_vocab_size  # no rows that no token uses
    assert len(list(path.parent.glob("*.yaml"))) == 4


@pytest.mark.parametrize("overrides", [[], ["training.micro_batch_size=4"]], ids=["80 GB", "141 GB"])
def test_the_8b_recipe_is_the_papers(overrides: list[str]) -> None:
    config = load_config(CONFIGS / "pretrain" / "llada_8b.yaml", overrides, world_size=8 * 40)
    tokens_per_step = config.training.global_batch_size * config.data.sequence_length
    assert tokens_per_step == 5_242_880
    assert config.optimizer.learning_rate[0].until_tokens == 2000 * tokens_per_step
    assert Timeline(config).end_samples // config.training.global_batch_size == 438_691  # 2.3T tokens, whole steps
    assert sum(corpus.weight for corpus in config.data.corpora) == pytest.approx(1)
    assert config.objective.random_length_probability == 0.01


@pytest.mark.parametrize(
    ("name", "world_sizes"), [("demo", [1, 2]), ("llada_100m", [1, 8]), ("llada_1b", [8, 64]), ("llada_8b", [64, 640])]
)
def test_recipes_run_on_the_machines_that_they_name(name: str, world_sizes: list[int]) -> None:
    for world_size in world_sizes:
        load_config(CONFIGS / "pretrain" / f"{name}.yaml", world_size=world_size)


def test_the_1b_recipe_is_as_long_as_the_papers_longest_1b_run() -> None:
    config = load_config(CONFIGS / "pretrain" / "llada_1b.yaml")
    assert Timeline(config).end_samples == 88_000 * 1280  # 461.37B tokens: Tab. 18


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("[ps]*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_recipe_is_planned(path: Path) -> None:
    config = load_config(path, world_size=2)
    config = config if config.sft is None else phases_in_tokens(config, 10_000)
    one = make_plan(config, Machine("h100", chip_called("h100"), 1, 2))
    assert one.steps > 0 and one.hours > 0 and one.memory[one.fullest].total > 0


@pytest.mark.parametrize(
    "gpu",
    ["h800", "h100", "h200"],
)
def test_the_8b_is_fine_tuned_on_one_node(gpu: str) -> None:
    """As the paper's 4.5M pairs are, by the plan's arithmetic: rows all as long as they may be, nothing offloaded."""
    config = phases_in_tokens(load_config(CONFIGS / "sft" / "llada_8b.yaml", world_size=8), 4_500_000)
    one = make_plan(config, Machine(gpu, chip_called(gpu), 1, 8))
    assert one.steps == math.ceil(3 * 4_500_000 / 256) and one.spare > 0.1 * one.machine.chip.memory_bytes


@pytest.mark.parametrize(
    ("name", "overrides", "gpu", "nodes"),
    [
        ("llada_8b", [], "h800", 40),
        ("llada_8b", [], "h100", 8),
        ("llada_8b", ["training.micro_batch_size=4"], "h200", 40),
        ("llada_1b", [], "h100", 8),
        ("llada_100m", [], "h100", 1),
    ],
)
def test_recipes_fit_their_gpus_and_are_nearly_the_quickest(
    name: str, overrides: list[str], gpu: str, nodes: int
) -> None:
    """By the plan's arithmetic: a tenth of the memory to spare, and no layout of tensor and data parallelism, ZeRO,
    micro-batch and recomputation is quicker by more than a sixth."""
    machine = Machine(gpu, chip_called(gpu), nodes, 8)
    config = load_config(CONFIGS / "pretrain" / f"{name}.yaml", overrides, machine.gpus)
    recipe = make_plan(config, machine)
    assert recipe.spare > 0.1 * machine.chip.memory_bytes
    simple = {f"parallel.{kind}_parallel" for kind in ("pipeline", "virtual_pipeline", "context")}
    assert recipe.hours < 7 / 6 * search(config, machine, None, 10e9, keep=simple).best[0].hours
