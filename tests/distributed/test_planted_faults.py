"""Known ways to get masked diffusion training wrong, planted one by one: each has to fail the check that is there.

The check is the loss and the gradient norm of the first steps against a loop of plain PyTorch, which knows no ranks and
reads the formulas off the paper; where precision itself is at fault, against one process.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_config
from layout_worker import LEARNING_RATE
from torch.nn import functional as F

from llada_train.config.load import load_config
from llada_train.convert.plain import plain_model
from llada_train.data.rows import PretrainingData
from llada_train.model.sizes import tensor_specs
from llada_train.model.weights import initial_tensor
from llada_train.objective.forward_process import training_noise
from llada_train.parallel.launch import launch_local

WORKER = Path(__file__).with_name("fault_worker.py")
STEPS = 3
TOLERANCE = 1e-5
WIRE_TOLERANCE = 1e-6  # only the order of fp32 sums differs
TP2, SP = "parallel.tensor_parallel=2", "parallel.sequence_parallel=true"
TOKEN, BF16 = "objective.loss_normalization=token", "training.precision=bf16"

SOUND = {"dp4": [], "tp2-dp2": [TP2], "tp2-sp-dp2": [TP2, SP], "dp4-token": [TOKEN]}
FAULTY = {
    "norm_gradients_of_a_slice": [TP2, SP],
    "head_gradient_of_a_slice": [TP2],
    "shared_noise": [],
    "local_normalization": [TOKEN],
    "causal_attention": [TP2],
    "unweighted_loss": [],
    "loss_at_every_position": [],
}


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the config file and of every run's result, sound or faulty."""
    output = tmp_path_factory.mktemp("faults")
    four: dict[str, tuple[str | None, list[str]]] = {name: (None, overrides) for name, overrides in SOUND.items()}
    four |= {fault: (fault, overrides) for fault, overrides in FAULTY.items()}
    four |= {"dp4-bf16": (None, [BF16]), "bf16_on_the_wire": ("bf16_on_the_wire", [BF16])}
    config = write_config(tiny_data, output)
    for processes, cases in [(4, four), (1, {"one-bf16": (None, [BF16])})]:
        assert launch_local(processes, [sys.executable, str(WORKER), str(config), str(output), json.dumps(cases)]) == 0
    return output


def result(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / f"{name}.json").read_text())


@cache
def plain_loop(config_file: Path, *overrides: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of STEPS steps (paper Alg. 1), one row at a time, cut where it is cut."""
    config = load_config(config_file, overrides)
    data, specs = PretrainingData(config), tensor_specs(config.model)

    class Weights:
        def names(self) -> list[str]:
            return list(specs)

        def read(self, name: str) -> torch.Tensor:
            return initial_tensor(name, specs[name], config.seed)

    model = plain_model(Weights(), config.model).train()
    settings, N = config.optimizer, config.training.global_batch_size
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=settings.betas,
        eps=settings.eps,
    )
    found: tuple[list[float], list[float]] = ([], [])
    for first in range(0, STEPS * N, N):
        noise = training_noise(config.seed, first, N, data.sequence_length, config.objective)
        total = torch.zeros(())
        for i, row in enumerate(data.training_rows(range(first, first + N))):
            L, p = int(noise.lengths[i]), float(noise.mask_probability[i])
            clean, mask = torch.from_numpy(row[:L]), torch.from_numpy(noise.mask(i))
            logits = model(clean.masked_fill(mask, data.tokenizer.mask_id).unsqueeze(0)).logits[0]
            tokens = float(noise.lengths.sum()) if TOKEN in overrides else L * N
            total = total + F.cross_entropy(logits[mask], clean[mask], reduction="sum") / (p * tokens)
        adam.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        adam.step()
        found[0].append(total.item())
        found[1].append(norm.item())
    return found


def deviation(runs: Path, name: str, overrides: list[str]) -> float:
    """The largest relative difference from the plain loop, of any step's loss or gradient norm."""
    normalization = [override for override in overrides if override == TOKEN]
    losses, norms = plain_loop(runs / "config.yaml", *normalization)
    found = result(runs, name)
    pairs = zip([*found["losses"], *found["norms"]], [*losses, *norms], strict=True)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


@pytest.mark.parametrize("name", SOUND)
def test_the_sound_program_trains_as_a_plain_loop(runs: Path, name: str) -> None:
    assert deviation(runs, name, SOUND[name]) < TOLERANCE


@pytest.mark.parametrize("fault", FAULTY)
def test_fault_is_noticed(runs: Path, fault: str) -> None:
    assert deviation(runs, fault, FAULTY[fault]) > 10 * TOLERANCE


def test_gradients_rounded_on_the_wire_are_noticed(runs: Path) -> None:
    reference, sound, faulty = (result(runs, name)["norms"][0] for name in ("one-bf16", "dp4-bf16", "bf16_on_the_wire"))
    assert sound == pytest.approx(reference, rel=WIRE_TOLERANCE)
    assert faulty != pytest.approx(reference, rel=WIRE_TOLERANCE)
