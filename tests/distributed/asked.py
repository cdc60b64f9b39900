"""What a model is asked, whole or split: texts by every way of sampling, likelihoods, a bound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import training_run  # quiets the engines before they are imported

import numpy as np  # isort: skip
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.schema import ParallelConfig, SamplesConfig
from llada_train.convert import split
from llada_train.convert.load import Loaded, loaded
from llada_train.data.batch import Batch
from llada_train.data.opening import open_data
from llada_train.evaluation.bound import variational_bound
from llada_train.evaluation.likelihood import log_likelihoods
from llada_train.objective.forward_process import validation_noise
from llada_train.parallel import topology
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import continue_prompts, fill_rows
from llada_train.training.samples import Samples

WAYS = {
    "greedy": SamplingOptions(),
    "drawn": SamplingOptions(6, temperature=1.0, block_length=6, seed=3),
    "guided": SamplingOptions(6, temperature=0.5, cfg=0.5),
    "random": SamplingOptions(4, remasking="random", temperature=1.0),
    "threshold": SamplingOptions(block_length=6, threshold=0.02),
}
PROMPTS = [[5, 6], [7, 3, 9, 11, 4], [8], [9, 9, 3, 5], [4, 12, 5, 5, 5, 5, 20]]
PAIRS = [([3, 1], [5, 2, 8]), ([4], [1]), ([9] * 7, [3, 2, 1, 0])]


def answers(model: Loaded) -> dict[str, Any]:
    mask_id, eos_id = model.tokenizer.mask_id, model.tokenizer.eos_id
    found: dict[str, Any] = {
        name: continue_prompts(model.sampler, PROMPTS, 12, options, mask_id, [eos_id], batch_size=4)
        for name, options in WAYS.items()
    }
    holes = [[5, mask_id, 7, mask_id, mask_id, 9], [mask_id, 6, mask_id]]
    found["infilling"] = fill_rows(model.sampler, holes, WAYS["drawn"], mask_id)
    for cfg in (0.0, 0.5):
        scores = log_likelihoods(model.scorer, PAIRS, mask_id, samples=9, seed=5, cfg=cfg, batch_size=7)
        found[f"likelihoods {cfg}"] = [one.value for one in scores]
    rows = np.random.default_rng(0).integers(0, 200, (6, 16))
    noise = validation_noise(1, [len(rows)], 16, epsilon=1e-3)
    found["bound"] = variational_bound(model.scorer, rows, noise, mask_id, lambda row: (4, 12)).mean
    return found


def drawn(model: Loaded) -> list[list[int]]:
    mask_id = model.tokenizer.mask_id
    return continue_prompts(model.sampler, PROMPTS, 12, WAYS["drawn"], mask_id, [model.tokenizer.eos_id])


def ask(path: Path, parallel: dict[str, int | bool], what: Callable[[Loaded], Any] = answers) -> Any:
    """On one of N processes."""
    with loaded(path, ParallelConfig.model_validate(parallel)) as model:
        return model.lead(lambda: what(model))


def ask_what_rank_0_found(path: Path, parallel: dict[str, int | bool]) -> list[list[int]]:
    """Draws on ranks of which the others do not see the newest checkpoint of a run."""
    unseen = {} if topology.rank() == 0 else {"side_effect": UserError("not seen here")}
    with mock.patch.object(split, "resolve", wraps=split.resolve, **unseen):
        return ask(path, parallel, drawn)


def refusal(path: Path, parallel: dict[str, int | bool]) -> str:
    """What is raised on this rank if rank 0 meets a mistake of the user's after some questions."""

    def work(model: Loaded) -> None:
        drawn(model)
        raise UserError("refused")

    try:
        ask(path, parallel, work)
    except UserError as error:
        return str(error)
    return "nothing"


def texts_on_the_way(config_file: Path, overrides: list[str]) -> tuple[list[tuple[str, str]] | None, int]:
    """Of an engine that has not trained yet; and how many rows the largest of its forward passes had."""
    config = load_config(config_file, overrides, topology.world_size())
    here = topology.initialize(config.parallel)
    engine = training_run.initial_engine(config, here)
    rows, hidden = [], engine.hidden

    def watched(batches: list[Batch]) -> list[Tensor]:
        rows.extend(len(batch.input_ids) for batch in batches)
        return hidden(batches)

    with mock.patch.object(engine, "hidden", watched):
        prompts = ["the", "of", "and the of", "to", "in", "is"]
        wanted = SamplesConfig(prompts=prompts, gen_length=3, temperature=1.0)
        texts = Samples(open_data(config), config, engine).texts(wanted)
    topology.shutdown()
    return texts, max(rows)
