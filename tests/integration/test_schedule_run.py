"""A run whose batch size, length and mixture change on the way: stopped and gone on with, and changed by hand."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import write_config
from test_resume import finish, numbers, stop

from llada_train.checkpoint.manifest import read_manifest
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import FOLDER, checkpoints

# Steps of 8 × 32, from 512 tokens on of 12 × 32, from 1,280 on of 12 × 16 and with another corpus, from 2,624 on of
# 16 × 16.
SCHEDULE: list[dict[str, Any]] = [
    {"from_tokens": 500, "global_batch_size": 12},
    {"from_tokens": 1_250, "sequence_length": 16},
    {"from_tokens": 2_500, "global_batch_size": 16},
]
UNTIL = 4_000


def new_run(data: Path, folder: Path, *, batch_size: int = 8) -> Path:
    folder.mkdir(exist_ok=True)
    other = folder.parent / "other"
    if not other.with_suffix(".bin").exists():
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(data / f"corpus{suffix}", other.with_suffix(suffix))
    corpora = [{"path": str(data / "corpus"), "validation_documents": 20}, {"path": str(other), "weight": 0}]
    schedule = [SCHEDULE[0], SCHEDULE[1] | {"weights": {str(other): 2.0}}, SCHEDULE[2]]
    return write_config(
        data,
        folder,
        data__corpora=corpora,
        schedule=schedule,
        optimizer__learning_rate=[{"until_tokens": UNTIL, "end": 2e-3}],
        training__global_batch_size=batch_size,
    )


def newest(config: Path) -> Path:
    return checkpoints(config.parent / "run" / FOLDER)[-1]


def test_a_run_that_changes_on_the_way(tiny_data: Path, tmp_path: Path) -> None:
    straight, stopped = (new_run(tiny_data, tmp_path / name) for name in ("straight", "stopped"))
    finish(straight, 2)
    train = [record for record in numbers(straight) if record["kind"] == "train"]
    per_step = [
        (b["consumed_samples"] - a["consumed_samples"], b["tokens"] - a["tokens"])
        for a, b in zip([{"consumed_samples": 0, "tokens": 0}, *train], train, strict=False)
    ]
    assert per_step == [(8, 256)] * 2 + [(12, 384)] * 2 + [(12, 192)] * 7 + [(16, 256)] * 6

    stop(stopped, 2, [signal.SIGTERM])
    finish(stopped, 2)
    assert numbers(stopped) == numbers(straight)
    a, b = newest(straight), newest(stopped)
    assert read_manifest(a).progress == read_manifest(b).progress
    assert len(read_manifest(a).progress.phases) == 4
    with Checkpoint(a) as x, Checkpoint(b) as y:
        assert all(torch.equal(x.read(name), y.read(name)) for name in x.names())

    # What was not announced: another batch size from now on, and a longer run.
    longer = "optimizer.learning_rate.0.until_tokens=5000"
    command = [
        sys.executable,
        "-m",
        "llada_train.cli",
        "pretrain",
        str(stopped),
        longer,
        "schedule.2.global_batch_size=8",
    ]
    refused = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "schedule.2.global_batch_size: 16 → 8" in refused.stderr and "--accept-config-changes" in refused.stderr
    command += ["--accept-config-changes", "--processes", "2"]
    accepted = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert "accepted: schedule.2.global_batch_size: 16 → 8" in accepted.stdout
    (line,) = (stopped.parent / "run" / "config_changes.jsonl").read_text().splitlines()
    assert json.loads(line)["changes"] == ["schedule.2.global_batch_size: 16 → 8"]
    manifest = read_manifest(newest(stopped))
    assert manifest.config.schedule[2].global_batch_size == 8
    assert [phase.global_batch_size for phase in manifest.progress.phases] == [8, 12, 12, 16, 8]
    assert manifest.progress.phases[:4] == read_manifest(a).progress.phases
