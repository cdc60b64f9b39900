"""Bad input to `llada-train pretrain`: one message on stderr, exit code 2, no traceback, nothing half-written."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_corpus, write_config

from llada_train.checkpoint.store import FOLDER, checkpoints
from llada_train.training.metrics import read_metrics

# As `llada-train pretrain`, but the power goes when the second checkpoint's data is written and its manifest is not.
KILLED_WHILE_SAVING = """
import os, sys
from llada_train import cli
from llada_train.checkpoint import writer
write = writer.write_manifest
def dies_the_second_time(folder, manifest):
    if manifest.progress.step == 10:
        os._exit(137)
    write(folder, manifest)
writer.write_manifest = dies_the_second_time
sys.argv = ["llada-train", "pretrain", sys.argv[1]]
cli.main()
"""


def fails(config: Path, *overrides: str, processes: int | None = 2, **settings: Any) -> str:
    """Run pretrain and expect one message; returns it."""
    command = [sys.executable, "-m", "llada_train.cli", "pretrain", str(config), *overrides]
    if processes is not None:
        command += ["--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
    assert done.returncode == 2, done.stderr
    starts = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert starts == done.stderr.splitlines()[:1]  # once, and nothing before it
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    return done.stderr


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cut_corpus(data: Path, folder: Path) -> str:
    corpus = copy_corpus(data, folder)
    content = (folder / "corpus.bin").read_bytes()
    (folder / "corpus.bin").write_bytes(content[: len(content) // 2])
    return f"data.corpora.0.path={corpus}"


def other_tokenizer(data: Path, folder: Path) -> str:
    from data_tools.train_tokenizer import train_tokenizer

    train_tokenizer(iter(["another text altogether"] * 50), 290, folder / "other")
    return f"data.tokenizer={folder / 'other'}"


def foreign_hf_folder(data: Path, folder: Path) -> str:
    from hf_folders import exported_folder

    hf = exported_folder(folder / "source", data / "tokenizer")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"mask_token_id": 7}))
    return f"init_from={hf}"


def run_dir_under_a_file(_: Path, folder: Path) -> str:  # permissions do not bind root, who runs tests in containers
    (folder / "file").write_text("not a folder")
    return f"run_dir={folder / 'file' / 'run'}"


def setting(text: str, *_: Path) -> str:
    return text


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(partial(setting, "data.corpora.0.path=nowhere/web"), ["nowhere/web.bin", "tokenize"], id="corpus"),
        pytest.param(cut_corpus, ["corpus.bin", "truncated"], id="cut corpus"),
        pytest.param(other_tokenizer, ["was not tokenized with", "data.tokenizer"], id="tokenizer of another corpus"),
        pytest.param(partial(setting, "data.tokenizer=nowhere"), ["nowhere"], id="tokenizer"),
        pytest.param(partial(setting, "model.vocab_size=100"), ["model.vocab_size 100", "300"], id="small vocabulary"),
        pytest.param(run_dir_under_a_file, ["run_dir", "file/run", "cannot be written"], id="unwritable run folder"),
        pytest.param(partial(setting, "training.micro_batchsize=2"), ["micro_batch_size"], id="unknown key"),
        pytest.param(partial(setting, "parallel.tensor_parallel=4"), ["4", "2 were started"], id="world size"),
        pytest.param(partial(setting, "init_from=nowhere"), ["nowhere", "checkpoint"], id="init_from of nothing"),
        pytest.param(
            foreign_hf_folder,
            ["small: 5 problems", "mask_token_id is 7, but the tokenizer's is 2", "model.hidden_size: 32 → 64"],
            id="init_from of another model's Hugging Face folder",
        ),
        pytest.param(
            partial(setting, "data.corpora.0.validation_documents=299"), ["corpus", "documents"], id="too few tokens"
        ),
    ],
)
def test_fault_is_told_once_before_any_process_starts(
    tiny_data: Path, tmp_path: Path, fault: Callable[[Path, Path], str], words: list[str]
) -> None:
    override = fault(tiny_data, tmp_path)
    # Rows as long as the model takes, so that one document is less than a row.
    config = write_config(tiny_data, tmp_path, data__sequence_length=64, model__max_sequence_length=64)
    before = files(tmp_path)
    message = fails(config, override)
    for word in words:
        assert word in message
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def used(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that was killed while it saved its second checkpoint."""
    config = write_config(tiny_data, tmp_path_factory.mktemp("used"))
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(config)], timeout=120)
    assert done.returncode == 137
    return config


def test_used_run_folder_is_refused(used: Path) -> None:
    before = files(used.parent)
    message = fails(used, "seed=7", "optimizer.weight_decay=0.2")
    assert "seed: 1234 → 7" in message and "optimizer.weight_decay: 0.1 → 0.2" in message
    message = fails(used, "resume=never")
    assert "step-00000005" in message and "run_dir" in message
    assert files(used.parent) == before


def test_initial_weights_of_another_model_are_refused(tiny_data: Path, tmp_path: Path, used: Path) -> None:
    config = write_config(tiny_data, tmp_path, init_from=str(used.parent / "run"), model__num_layers=2)
    assert "num_layers: 4 → 2" in fails(config)
    assert not (tmp_path / "run").exists()


def test_killed_and_failed_saves_leave_the_old_checkpoint(used: Path) -> None:
    """Killed while saving; then no room to save; then damaged; then mended: the run goes on each time it can."""
    root = used.parent / "run" / FOLDER
    old = root / "step-00000005"
    assert checkpoints(root) == [old] and (root / "step-00000010.tmp").is_dir()
    before = files(old)

    limit = 100_000  # bytes of any one file: enough for the log, not for a checkpoint
    message = fails(used, processes=None, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "step-00000010: the checkpoint could not be written" in message and "older checkpoints" in message
    assert files(old) == before and sorted(path.name for path in root.iterdir()) == ["latest", old.name]

    data = next(path for path in before if path.suffix == ".safetensors")
    flipped = bytearray(before[data])
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    message = fails(used)  # found by all of two processes, told by one
    assert str(data) in message and "checksum" in message

    data.write_bytes(before[data])
    done = subprocess.run([sys.executable, "-m", "llada_train.cli", "pretrain", str(used)], timeout=120)
    assert done.returncode == 0
    assert [path.name for path in checkpoints(root)] == ["step-00000005", "step-00000010"]
    assert not list(used.parent.rglob("*.tmp"))
    steps = [record["step"] for record in read_metrics(used.parent / "run") if record["kind"] == "train"]
    assert steps == list(range(1, 11))
