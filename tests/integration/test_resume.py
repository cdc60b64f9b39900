"""Stopped by a signal, gone on with by the same command: the run is the one that was never stopped."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sft_settings, write_config
from disturbed import TIMINGS

from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import FOLDER, LATEST, checkpoints
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.training.metrics import read_metrics
from llada_train.training.run_folder import RunFolder

STEPS = 20
TOKENS_PER_STEP = 16 * 32
PHASES = [{"until_tokens": 4 * TOKENS_PER_STEP, "end": 2e-3}, {"until_tokens": STEPS * TOKENS_PER_STEP, "end": 1e-3}]

Record = dict[str, Any]


def new_run(data: Path, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    return write_config(data, folder, **{"optimizer__learning_rate": PHASES, **settings})


def start(config: Path, processes: int) -> subprocess.Popen[str]:
    kind = load_config(config).command
    command = [sys.executable, "-m", "llada_train.cli", kind, str(config), "--processes", str(processes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(config: Path, processes: int) -> str:
    """Run to the end; what it said."""
    process = start(config, processes)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    newest = checkpoints(config.parent / "run" / FOLDER)[-1]
    assert output.splitlines()[-1] == f"complete at step {int(newest.name.split('-')[1])}; checkpoint {newest}"
    return output


def stop(config: Path, processes: int, signals: list[int]) -> str:
    """Run, send the signals to the launcher after a few steps, and expect to be told how to go on; what it said."""
    process = start(config, processes)
    deadline = time.monotonic() + 120
    while not any(record["step"] >= 3 for record in read_metrics(config.parent / "run")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (75, "")
    newest = checkpoints(config.parent / "run" / FOLDER)[-1]
    step = int(newest.name.split("-")[1])
    assert 3 <= step < STEPS
    told = f"stopped by a signal after step {step}; checkpoint {newest}; run the same command to go on"
    assert output.splitlines()[-1] == told
    return output


def numbers(config: Path) -> list[Record]:
    """Every record of metrics.jsonl without its timings."""
    records = read_metrics(config.parent / "run")
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def assert_same_weights(*configs: Path) -> None:
    newest = [checkpoints(config.parent / "run" / FOLDER)[-1] for config in configs]
    with Checkpoint(newest[0]) as x, Checkpoint(newest[1]) as y:
        assert x.manifest.progress.step == y.manifest.progress.step == STEPS
        for name in x.names():
            assert torch.equal(x.read(name), y.read(name)), name


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished fp32 run of 2 processes that nothing stopped."""
    config = new_run(tiny_data, tmp_path_factory.mktemp("resume") / "straight")
    finish(config, 2)
    return config


def test_stopped_run_goes_on_bit_for_bit(tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    config = new_run(tiny_data, tmp_path / "stopped")
    # The first signal ends the run; the later ones come while it saves.
    stop(config, 2, [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM])
    run = config.parent / "run"
    saved = checkpoints(run / FOLDER)[-1]
    assert (run / FOLDER / LATEST).read_text().strip() == saved.name
    first_part = [record for record in numbers(config) if record["kind"] == "train"]
    assert first_part == [record for record in numbers(straight) if record["kind"] == "train"][: len(first_part)]

    output = finish(config, 2)
    step = int(saved.name.split("-")[1])
    assert output.splitlines()[0] == f"resuming from {saved} at step {step}"
    assert numbers(config) == numbers(straight)
    assert_same_weights(config, straight)


def test_stopped_fine_tuning_in_a_bf16_pipeline_goes_on_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    settings = {
        **sft_settings(tiny_data),
        "sft": {"rows": "packed"},
        "training__precision": "bf16",
        "parallel__pipeline_parallel": 2,
        "training__micro_batch_size": 2,
        "optimizer__learning_rate": [{"until_steps": 4, "end": 2e-3}, {"until_steps": STEPS, "end": 1e-3}],
        "validation__samples": {"prompts": ["of"], "interval_steps": 1, "gen_length": 2, "temperature": 1.0},
    }
    straight = new_run(tiny_data, tmp_path / "straight", **settings)
    finish(straight, 2)
    config = new_run(tiny_data, tmp_path / "stopped", **settings)
    stop(config, 2, [signal.SIGUSR1])
    finish(config, 2)
    assert numbers(config) == numbers(straight)
    assert_same_weights(config, straight)


def test_checkpoint_of_four_processes_goes_on_in_other_layouts(
    tiny_data: Path, tmp_path: Path, straight: Path, request: pytest.FixtureRequest
) -> None:
    four = new_run(
        tiny_data,
        tmp_path / "tp2-pp2-sp",
        parallel__tensor_parallel=2,
        parallel__pipeline_parallel=2,
        parallel__sequence_parallel=True,
    )
    stop(four, 4, [signal.SIGTERM])
    interleaved = {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2, "context_parallel": 2}
    layouts: list[tuple[int, dict[str, int]]] = [(1, {}), (4, interleaved), (2, {}), (4, {"zero_stage": 3})]
    for processes, parallel in layouts if request.config.getoption("every_layout") else layouts[:2]:
        folder = tmp_path / f"{processes}-{len(parallel)}"
        shutil.copytree(four.parent, folder)
        config = write_config(tiny_data, folder, optimizer__learning_rate=PHASES, parallel=parallel)
        finish(config, processes)
        found, expected = numbers(config), numbers(straight)
        assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
        for record, reference in zip(found, expected, strict=True):
            for key in record.keys() & {"loss", "grad_norm", "bound"}:
                assert record[key] == pytest.approx(reference[key], rel=1e-5), (parallel, record["step"], key)


def copy_of(straight: Path, folder: Path, data: Path, **settings: Any) -> Path:
    """The finished run, to be gone on with under other settings."""
    config = new_run(data, folder, **settings)
    shutil.copytree(straight.parent / "run", folder / "run")
    return config


def test_the_learning_rate_to_come_may_be_changed(tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    """A finished run is made longer; what the paper's authors did at 1.2T tokens needs no more."""
    config = copy_of(straight, tmp_path / "longer", tiny_data)
    longer = [*PHASES, {"until_tokens": (STEPS + 2) * TOKENS_PER_STEP, "start": 1e-4, "end": 1e-4}]
    write_config(tiny_data, config.parent, optimizer__learning_rate=longer)
    finish(config, 1)
    last = [record for record in numbers(config) if record["kind"] == "train"][-2:]
    assert [(r["step"], r["consumed_samples"], r["learning_rate"]) for r in last] == [
        (STEPS + 1, 16 * (STEPS + 1), 1e-4),
        (STEPS + 2, 16 * (STEPS + 2), 1e-4),
    ]


def test_another_model_is_refused_whatever_else_is_left_in_the_folder(
    tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    config = copy_of(straight, tmp_path / "other", tiny_data, model__num_layers=2)
    (config.parent / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"another config.*\n  model.num_layers: 4 → 2"):
        RunFolder(load_config(config))
