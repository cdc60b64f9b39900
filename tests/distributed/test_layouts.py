"""The layout matrix: same seed, data and noise give the same losses, gradient norms and weights in every layout."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_config

from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import checkpoints
from llada_train.config.load import load_config
from llada_train.model.weights import initial_tensor
from llada_train.parallel.launch import launch_local

WORKER = Path(__file__).with_name("layout_worker.py")
TP2, PP2, SP = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2", "parallel.sequence_parallel=true"
ZERO2 = "parallel.zero_stage=2"
FOUR_PROCESSES: dict[str, list[str]] = {
    "dp4": [],
    "dp4-micro-batch-1": ["training.micro_batch_size=1"],
    "dp4-zero2": [ZERO2],
    "tp2-dp2": [TP2],
    "tp2-sp-dp2-zero2": [TP2, SP, ZERO2],
    "tp2-sp-dp2": [TP2, SP],
    "pp2-dp2": [PP2],
    "pp4": ["parallel.pipeline_parallel=4"],
    "tp2-pp2": [TP2, PP2],
    "tp2-pp2-sp": [TP2, PP2, SP],
}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # relative, of losses and gradient norms
WEIGHT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # ‖w − w_ref‖ ÷ ‖w_ref − w_0‖


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def matrix(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Precision, config file, and the folder of all layouts' results; "one" is the single process."""
    precision, output = request.param, tmp_path_factory.mktemp(f"layouts-{request.param}")
    config = write_config(tiny_data, output, training__precision=precision)
    for processes, layouts in [(1, {"one": []}), (4, FOUR_PROCESSES)]:
        command = [sys.executable, str(WORKER), str(config), str(output), json.dumps(layouts)]
        assert launch_local(processes, command) == 0
    return precision, config, output


def result(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / f"{name}.json").read_text())


@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_layout_trains_as_one_process(matrix: tuple[str, Path, Path], name: str) -> None:
    precision, _, output = matrix
    found, reference = result(output, name), result(output, "one")
    for key in ("losses", "norms", "validation"):
        assert found[key] == pytest.approx(reference[key], rel=TOLERANCE[precision]), key
    for step, expected in zip(found["bounds_by_t"], reference["bounds_by_t"], strict=True):
        assert [b is None for b in step] == [b is None for b in expected]
        known = [b for b in expected if b is not None]
        assert [b for b in step if b is not None] == pytest.approx(known, rel=5 * TOLERANCE[precision])


@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_layout_ends_with_the_weights_of_one_process(matrix: tuple[str, Path, Path], name: str) -> None:
    precision, config_file, output = matrix
    seed = load_config(config_file).seed
    with Checkpoint(checkpoints(output / name)[-1]) as found, Checkpoint(checkpoints(output / "one")[-1]) as reference:
        moved = deviation = 0.0
        for tensor, spec in found.specs.items():
            expected = reference.read(tensor)
            moved += float((expected - initial_tensor(tensor, spec, seed)).square().sum())
            deviation += float((found.read(tensor) - expected).square().sum())
    assert deviation**0.5 <= WEIGHT_TOLERANCE[precision] * moved**0.5


@pytest.mark.parametrize("name", ["dp4", "dp4-zero2"])
def test_data_parallel_gradients_are_summed_in_fp32(matrix: tuple[str, Path, Path], name: str) -> None:
    """Same micro-batches, other ranks: only the order of fp32 sums differs. Gradients rounded to bf16 on the wire, or
    added up in bf16, move the norm by more."""
    _, _, output = matrix
    first, reference = result(output, name)["norms"][0], result(output, "one")["norms"][0]
    assert first == pytest.approx(reference, rel=1e-6)


def test_the_same_layout_is_repeated_bit_for_bit(
    matrix: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, output = matrix
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    command = [sys.executable, str(WORKER), str(config), str(tmp_path), json.dumps({"tp2-pp2-sp": [TP2, PP2, SP]})]
    assert launch_local(4, command) == 0
    assert result(tmp_path, "tp2-pp2-sp") == result(output, "tp2-pp2-sp")
    with (
        Checkpoint(checkpoints(tmp_path / "tp2-pp2-sp")[-1]) as again,
        Checkpoint(checkpoints(output / "tp2-pp2-sp")[-1]) as before,
    ):
        assert all(torch.equal(again.read(name), before.read(name)) for name in again.names())
