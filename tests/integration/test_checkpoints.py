"""Checkpoints of real runs: disks that fill up, bits that flip, and `llada-train checkpoint`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_config
from disturbed import TIMINGS

from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import FOLDER, checkpoints
from llada_train.config.load import load_config
from llada_train.training.metrics import read_metrics
from llada_train.training.run_folder import lock

Run = Callable[..., subprocess.CompletedProcess[str]]

# As `llada-train pretrain`, but the disk takes no file larger than 100 kB while steps FIRST … LAST are trained.
FULL_FOR_A_WHILE = """
import resource, sys
from llada_train import cli
from llada_train.parallel.topology import quiet_engines
quiet_engines()
from llada_train.parallel import engine
first, last = map(int, sys.argv[2:4])
train_step, steps = engine.Engine.train_step, 0
def step(*arguments):
    global steps
    steps += 1
    limit = 100_000 if first <= steps <= last else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return train_step(*arguments)
engine.Engine.train_step = step
sys.argv = ["llada-train", "pretrain", sys.argv[1]]
cli.main()
"""


def pretrain(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llada_train.cli", "pretrain", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def root_of(config: Path) -> Path:
    return config.parent / "run" / FOLDER


def names(config: Path) -> list[str]:
    return [path.name for path in checkpoints(root_of(config))]


def numbers(config: Path) -> list[dict[str, Any]]:
    records = read_metrics(config.parent / "run")
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def flip(checkpoint: Path, file: str = "rank-00001.safetensors") -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / file).write_bytes(content)


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished run of ten steps on two processes, with checkpoints at 2, 4, 6, 8 and 10."""
    config = write_config(tiny_data, tmp_path_factory.mktemp("finished"), checkpoint={"interval_steps": 2, "keep": 9})
    done = pretrain(config, "--processes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert names(config) == [f"step-{step:08d}" for step in (2, 4, 6, 8, 10)]
    return config


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same run in a folder of its own."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    text = finished.read_text().replace(str(finished.parent), str(tmp_path))
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


def test_a_run_goes_on_while_the_disk_is_full_and_saves_again(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tiny_data, tmp_path, checkpoint={"interval_steps": 2, "keep": 9})
    command = [sys.executable, "-c", FULL_FOR_A_WHILE, str(config), "4", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    told = done.stderr.splitlines()
    for step, line in zip((4, 6), told, strict=True):
        assert line.startswith(f"warning: {root_of(config) / f'step-{step:08d}'}: THE CHECKPOINT COULD NOT")
    assert names(config) == ["step-00000002", "step-00000008", "step-00000010"]
    assert not list(config.parent.rglob("*.tmp"))


def test_a_run_on_a_full_disk_stops_after_some_failures(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tiny_data, tmp_path, checkpoint={"interval_steps": 2, "max_failures": 2})
    command = [sys.executable, "-c", FULL_FOR_A_WHILE, str(config), "4", "99"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: ") and "step-00000004" in warning
    assert error.startswith("error: ") and "step-00000006: the checkpoint could not be written" in error
    assert names(config) == ["step-00000002"]


def test_after_a_flipped_bit_the_run_goes_on_from_the_checkpoint_before(finished: Path, copy: Path) -> None:
    """And ends as it did."""
    newest, before = root_of(copy) / "step-00000010", root_of(copy) / "step-00000008"
    flip(newest)
    done = pretrain(copy, "--processes", "2")
    assert done.returncode == 0
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"warning: checkpoint {newest / 'rank-00001.safetensors'}: damaged: its checksum differs")
    assert done.stdout.splitlines()[0] == f"resuming from {before} at step 8"
    assert names(copy) == names(finished) and (root_of(copy) / "step-00000010.damaged").is_dir()
    assert numbers(copy) == numbers(finished)
    with Checkpoint(newest) as ours, Checkpoint(root_of(finished) / newest.name) as expected:
        for name in ours.names():
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                everything = [(0, ours.specs[name].numel)]
                assert torch.equal(ours.read_runs(name, kind, everything), expected.read_runs(name, kind, everything))


def test_list_tells_what_there_is(copy: Path, run_command: Run) -> None:
    run = copy.parent / "run"
    (root_of(copy) / "step-00000006" / "rank-00000.safetensors").unlink()
    done = run_command("llada_train.cli", "checkpoint", "list", run, "--json")
    found = json.loads(done.stdout)
    assert [one["step"] for one in found] == [2, 4, 6, 8, 10]
    assert [one["step"] for one in found if one["latest"]] == [10]
    assert [one["step"] for one in found if one["problem"]] == [6] and "missing" in found[2]["problem"]
    files = (root_of(copy) / "step-00000010").glob("*.safetensors")
    assert found[4]["bytes"] == sum(file.stat().st_size for file in files)
    assert (found[4]["samples"], found[4]["tokens"]) == (160, 160 * 32) and found[4]["layout"] == "DP 2 · ZeRO 1"
    table = run_command("llada_train.cli", "checkpoint", "list", run, COLUMNS="200").stdout
    assert "5,120" in table and "latest" in table and "DAMAGED" in table and "DP 2 · ZeRO 1" in table


def test_verify_reads_every_byte(copy: Path, run_command: Run) -> None:
    run = copy.parent / "run"
    flip(root_of(copy) / "step-00000004")
    done = run_command("llada_train.cli", "checkpoint", "verify", run)
    verdicts = done.stdout.splitlines()
    assert done.returncode == 1 and len(verdicts) == 5
    assert [line.endswith(": sound") for line in verdicts] == [True, False, True, True, True]
    damaged = root_of(copy) / "step-00000004" / "rank-00001.safetensors"
    assert verdicts[1].startswith(f"{damaged}: damaged: its checksum differs")
    one = run_command("llada_train.cli", "checkpoint", "verify", root_of(copy) / "step-00000006")
    assert (one.returncode, one.stdout) == (0, f"{root_of(copy) / 'step-00000006'}: sound\n")


def test_prune_keeps_what_it_is_told_and_the_newest_sound_one(copy: Path, run_command: Run) -> None:
    run = copy.parent / "run"
    prune = ("llada_train.cli", "checkpoint", "prune", run)
    freed = sum(file.stat().st_size for step in (2, 6) for file in (root_of(copy) / f"step-{step:08d}").iterdir())

    done = run_command(*prune, "--keep", "2", "--keep-every-steps", "4", "--dry-run")
    *said, last = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == [f"would remove {root_of(copy)}/step-0000000{i}" for i in (2, 6)]
    assert last == f"2 checkpoints, {freed / 1e6:,.1f} MB to be freed" and len(names(copy)) == 5

    with lock(load_config(copy).run_dir):
        done = run_command(*prune, "--keep", "1")
    assert done.returncode == 2 and "another run is at work" in done.stderr and len(names(copy)) == 5

    done = run_command(*prune, "--keep", "2", "--keep-every-steps", "4")
    assert done.stdout.splitlines()[-1] == f"2 checkpoints, {freed / 1e6:,.1f} MB freed"
    assert names(copy) == [f"step-{step:08d}" for step in (4, 8, 10)]

    flip(root_of(copy) / "step-00000010")  # in its size: it counts, but it is not the one to rely on
    assert run_command(*prune, "--keep", "1").returncode == 0
    assert names(copy) == ["step-00000008", "step-00000010"]
