"""A run that meets bad samples: it skips them, goes back and passes over them, or stops; a restart changes nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_config

from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import FOLDER, checkpoints
from llada_train.parallel.launch import free_port
from llada_train.training.metrics import read_metrics

SAMPLES = 16  # of a step
STEPS = 12
PHASES = [{"until_tokens": STEPS * SAMPLES * 32, "end": 1e-3}]
BAD = range(7, 10)  # steps, of which the first 6 are before


def new_run(data: Path, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    return write_config(data, folder, optimizer__learning_rate=PHASES, training__precision="bf16", **settings)


def start(config: Path, samples: range) -> list[subprocess.Popen[str]]:
    """Two processes that meet bad samples."""
    program = [sys.executable, str(Path(__file__).with_name("spoilt_pretrain.py"))]
    command = [*program, str(samples.start), str(samples.stop), str(config)]
    port = str(free_port())
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(Path.cwd())}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> tuple[str, str]:
    """What rank 0 said, after all have ended with this exit code."""
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [code, code], said
    return said[0]


def samples_of(steps: range) -> range:
    return range((steps.start - 1) * SAMPLES, (steps.stop - 1) * SAMPLES)


def last_progress(config: Path) -> Progress:
    with Checkpoint(checkpoints(config.parent / "run" / FOLDER)[-1]) as checkpoint:
        return checkpoint.manifest.progress


def assert_same_weights(*configs: Path) -> None:
    newest = [checkpoints(config.parent / "run" / FOLDER)[-1] for config in configs]
    with Checkpoint(newest[0]) as x, Checkpoint(newest[1]) as y:
        for name in x.names():
            assert torch.equal(x.read(name), y.read(name)), name


@pytest.fixture(scope="module")
def skipped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that skipped the bad steps where they came."""
    config = new_run(tiny_data, tmp_path_factory.mktemp("guards") / "skipped", guard__max_skips=4)
    finish(start(config, samples_of(BAD)))
    return config


def test_bad_steps_are_skipped_and_counted(skipped: Path) -> None:
    progress = last_progress(skipped)
    assert (progress.step, progress.consumed_samples) == (STEPS, STEPS * SAMPLES)
    assert (progress.guard.skipped_steps, progress.guard.skips_in_a_row) == (len(BAD), 0)
    records = read_metrics(skipped.parent / "run")
    assert [record["step"] for record in records if record["kind"] == "skip"] == list(BAD)
    trained = [record["step"] for record in records if record["kind"] == "train"]
    assert trained == [step for step in range(1, STEPS + 1) if step not in BAD]
    with Checkpoint(checkpoints(skipped.parent / "run" / FOLDER)[-1]) as checkpoint:
        assert checkpoint.manifest.optimizer_steps == STEPS - len(BAD)


def test_too_many_in_a_row_go_back_to_the_checkpoint_and_pass_over_the_samples(
    tiny_data: Path, tmp_path: Path, skipped: Path
) -> None:
    """The weights are those of the run that skipped them in place: neither has learnt from them."""
    config = new_run(tiny_data, tmp_path / "back", guard__max_skips=len(BAD))
    output, _ = finish(start(config, samples_of(BAD)))
    bad = samples_of(BAD)
    told = f"going back to step 5, passing over samples {bad.start} to {bad.stop - 1}"
    assert any(told in line for line in output.splitlines())
    progress = last_progress(config)
    before, after = progress.phases
    assert (before.end_sample, after.first_sample, after.first_token) == (bad.start, bad.stop, bad.stop * 32)
    assert (progress.step, progress.consumed_samples) == (STEPS - len(BAD), STEPS * SAMPLES)
    records = [record for record in read_metrics(config.parent / "run") if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, STEPS - len(BAD) + 1))
    consumed = [record["consumed_samples"] for record in records]
    assert consumed == [SAMPLES * step for step in range(1, STEPS + 1) if step not in BAD]
    assert_same_weights(config, skipped)


def test_a_stop_amid_bad_steps_changes_nothing(tiny_data: Path, tmp_path: Path, skipped: Path) -> None:
    """Nor do lines of the log and checkpoints that fall due amid them, when only one checkpoint is kept."""
    checkpoint = {"interval_steps": 2, "keep": 1}
    config = new_run(
        tiny_data,
        tmp_path / "stopped",
        guard__max_skips=len(BAD),
        checkpoint=checkpoint,
        logging__interval_steps=2,
    )
    processes = start(config, samples_of(BAD))
    deadline = time.monotonic() + 120
    while not any(record["kind"] == "skip" for record in read_metrics(config.parent / "run")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    finish(processes, 75)
    finish(start(config, samples_of(BAD)))
    progress = last_progress(config)
    assert (progress.step, progress.consumed_samples) == (STEPS - len(BAD), STEPS * SAMPLES)
    assert_same_weights(config, skipped)


def test_what_goes_on_being_bad_stops_the_run(tiny_data: Path, tmp_path: Path) -> None:
    config = new_run(tiny_data, tmp_path / "hopeless", guard__max_skips=2)
    output, errors = finish(start(config, samples_of(range(7, STEPS + 1))), 2)
    assert output.count("not applied: loss nan") == 4
    assert "went back to step 5 for such steps already" in errors and "step 8: loss nan" in errors
    assert len(errors.splitlines()) == 1
    assert last_progress(config).step == 5
