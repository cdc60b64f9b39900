"""What holds for conversions in both directions: killed, repeated, at once, in little memory."""

import ctypes
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import (
    MODELS,
    checkpoint,
    export,
    exported_folder,
    released_folder,
    small_tokenizer,
)

from llada_train.checkpoint.reader import open_verified
from llada_train.config.errors import UserError
from llada_train.convert import from_hf as from_hf_module
from llada_train.convert import to_hf as to_hf_module
from llada_train.convert.from_hf import HfWeights, from_hf
from llada_train.convert.to_hf import to_hf
from llada_train.model.sizes import slice_runs, tensor_specs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder)
    return folder


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_killed_conversion_leaves_no_output_and_may_be_repeated(
    direction: str, tokenizer: Path, tmp_path: Path
) -> None:
    small = exported_folder(tmp_path, tokenizer)

    def convert(on_progress: Any = lambda done, total: None) -> None:
        if direction == "from-hf":
            from_hf(small, tmp_path / "new", on_progress)
        else:
            export(tmp_path / "run", tmp_path / "new", on_progress=on_progress)

    def die(done: int, total: int) -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=convert, args=(die,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "new").exists() and (tmp_path / "new.partial").exists()
    convert()
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new.partial").exists()


def test_two_conversions_to_one_place(tokenizer: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and spoils nothing."""
    small = exported_folder(tmp_path, tokenizer)
    refused = []

    def once_more(done: int, total: int) -> None:
        with pytest.raises(UserError, match=r"new\.partial: another conversion is writing it"):
            export(tmp_path / "run", tmp_path / "new")
        refused.append(done)

    from_hf(small, tmp_path / "new", once_more)
    assert refused
    with HfWeights(small) as theirs, open_verified(tmp_path / "new") as ours:
        assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.names())
    assert not (tmp_path / "new.partial").exists()


def peak(work: Any, out: Any) -> None:
    """How far resident memory rises, in bytes."""

    def resident(field: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    out.put(resident("VmHWM") - before)


def test_memory_holds_pieces_of_tensors(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions on a model whose two largest tensors are 128 MB each, as fp32."""
    released_folder(tmp_path / "hf", d_model=256, n_layers=1, mask_token_id=2, eos_token_id=1)
    for file in tokenizer.iterdir():  # the released one takes more memory than these weights
        shutil.copy(file, tmp_path / "hf")
    monkeypatch.setattr(from_hf_module, "_CHUNK", 1 << 17)
    monkeypatch.setattr(to_hf_module, "_CHUNK", 1 << 17)
    checkpoint(tmp_path / "run", MODELS[1], tokenizer)  # what is imported and started only once
    export(tmp_path / "run", tmp_path / "first")
    from_hf(tmp_path / "first", tmp_path / "first-back")

    def back() -> None:
        with open_verified(tmp_path / "ours") as weights:
            to_hf(weights, tmp_path / "back")

    def slice_of_a_rank() -> None:
        with HfWeights(tmp_path / "hf") as weights:
            spec = tensor_specs(weights.model)["embedding.weight"]
            assert len(weights.read_runs("embedding.weight", slice_runs(spec, 3, 8))) == spec.numel // 8

    fork = multiprocessing.get_context("fork")
    for work in (lambda: from_hf(tmp_path / "hf", tmp_path / "ours"), back, slice_of_a_rank):
        results = fork.SimpleQueue()
        child = fork.Process(target=peak, args=(work, results))
        child.start()
        child.join()
        assert results.get() < 64 * 2**20  # buffers, and what the interpreter loads (20 to 30 MB): half of one tensor
