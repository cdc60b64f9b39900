"""A checkpoint's files, written here by hand in many layouts, and damaged in many ways."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SPECS, TENSORS, slices, write, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.checkpoint import manifest as manifest_file
from llada_train.checkpoint.manifest import (
    FILE_NAME,
    FORMAT,
)
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.store import FOLDER, checkpoints, resolve
from llada_train.config.errors import UserError
from llada_train.model.sizes import slice_runs


@settings(max_examples=25, deadline=None)
@given(
    tensor_parallel=st.sampled_from([1, 2, 4]),
    shares=st.lists(st.floats(0, 1), max_size=3),
    wanted=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_any_layout_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    tensor_parallel: int,
    shares: list[float],
    wanted: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint") / "step-00000003"
    write(folder, tensor_parallel, lambda numel: [round(share * numel) for share in shares])
    with Checkpoint(folder) as checkpoint:
        for name, spec in SPECS.items():
            assert torch.equal(checkpoint.read(name), TENSORS[f"master/{name}"])
            parts = slices(TENSORS[f"exp_avg/{name}"], name, wanted)
            index = data.draw(st.integers(0, len(parts) - 1))
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, parts[0].numel())] * 2)))
            found = checkpoint.read_runs(name, "exp_avg", slice_runs(spec, index, len(parts), start, stop))
            assert torch.equal(found, parts[index].flatten()[start:stop])
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "step-00000003")


def read_everything(folder: Path) -> None:
    with Checkpoint(folder) as found:
        for name in found.names():
            found.read(name)


def test_sound_checkpoint_is_verified(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as found:
        found.verify(found.manifest.files)
    read_everything(checkpoint)


def test_flipped_bit_is_found(checkpoint: Path) -> None:
    file = checkpoint / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with Checkpoint(checkpoint) as found, pytest.raises(UserError, match=r"rank-00001\.safetensors: .*checksum"):
        found.verify(found.manifest.files)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "bytes"),
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_bytes(b"\xff" * file.stat().st_size), "damaged"),
    ],
    ids=["cut", "missing", "overwritten"],
)
def test_damaged_file_is_named(checkpoint: Path, damage: Callable[[Path], object], words: str) -> None:
    file = checkpoint / "rank-00002.safetensors"
    damage(file)
    with pytest.raises(UserError) as error:
        read_everything(checkpoint)
    assert str(error.value).startswith(f"{file}: ") and words in str(error.value)


def first_fragment(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["tensors"]["head.weight"][0]


def rename_file(tree: dict[str, Any], name: str) -> None:
    tree["files"][name] = tree["files"].pop("rank-00000.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda tree: rename_file(tree, "../outside.safetensors"), id="file outside"),
        pytest.param(lambda tree: rename_file(tree, "/etc/passwd"), id="absolute file"),
        pytest.param(lambda tree: first_fragment(tree).update(file="../x.safetensors"), id="fragment outside"),
        pytest.param(lambda tree: first_fragment(tree).update(file="rank-00099.safetensors"), id="unlisted file"),
        pytest.param(lambda tree: first_fragment(tree).update(start=1), id="gap"),
        pytest.param(lambda tree: first_fragment(tree).update(stop=10**15), id="beyond the end"),
        pytest.param(lambda tree: first_fragment(tree).update(stop=2**63), id="beyond int64"),
        pytest.param(lambda tree: first_fragment(tree).update(start=-1), id="negative start"),
        pytest.param(lambda tree: first_fragment(tree).update(start=9, stop=8), id="backwards"),
        pytest.param(lambda tree: first_fragment(tree).update(start=True), id="no number"),
        pytest.param(lambda tree: tree["files"]["rank-00000.safetensors"].update(size=-1), id="negative size"),
        pytest.param(lambda tree: tree["progress"].update(consumed_samples=2**70), id="progress beyond int64"),
        pytest.param(lambda tree: tree["config"]["model"].update(num_layers=10**12), id="too many layers for a table"),
        pytest.param(lambda tree: tree["config"]["model"].update(hidden_size=4 * 10**12), id="too wide for a table"),
        pytest.param(lambda tree: first_fragment(tree).update(count=0), id="no slices"),
        pytest.param(lambda tree: first_fragment(tree).update(count=7), id="uneven slices"),
        pytest.param(lambda tree: first_fragment(tree).update(index=5), id="no such slice"),
        pytest.param(lambda tree: first_fragment(tree).update(index=-1), id="negative slice"),
        pytest.param(lambda tree: tree["tensors"]["head.weight"].append(first_fragment(tree)), id="twice"),
        pytest.param(lambda tree: tree["tensors"]["head.weight"].clear(), id="no fragments"),
        pytest.param(lambda tree: tree["tensors"].pop("head.weight"), id="tensor missing"),
        pytest.param(lambda tree: tree.update(format=FORMAT + 1), id="later format"),
        pytest.param(lambda tree: tree.update(surprise=1), id="unknown key"),
        pytest.param(lambda tree: tree["config"]["model"].update(num_heads=3), id="config that is none"),
        pytest.param(lambda tree: tree["config"]["model"].update(num_layers=2), id="config of another model"),
        pytest.param(lambda tree: tree["files"]["rank-00000.safetensors"].update(sha256="0"), id="short checksum"),
    ],
)
def test_damaged_manifest_is_named(checkpoint: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / FILE_NAME
    tree = json.loads(path.read_text())
    damage(tree)
    write_text(checkpoint, json.dumps(tree).encode())
    with pytest.raises(UserError) as error:
        Checkpoint(checkpoint)
    assert str(error.value).startswith(f"{path}: ") and "checksum" not in str(error.value)


@settings(max_examples=50, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_cut_manifest_is_named(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = json.dumps({"format": FORMAT, "files": {}})
    write_text(folder, whole[: int(cut * len(whole))].encode())
    with pytest.raises(UserError, match=FILE_NAME):
        Checkpoint(folder)


def test_oversized_manifest_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / FILE_NAME).open("r+b") as file:
        file.truncate(manifest_file.MAX_BYTES + 1)  # sparse: no disk space
    with pytest.raises(UserError, match="too large for a manifest"):
        Checkpoint(checkpoint)


def test_half_written_and_set_aside_checkpoints_do_not_count(tmp_path: Path) -> None:
    root = tmp_path / FOLDER
    root.mkdir()
    others = ("step-00000030.tmp", "step-00000031.removed", "step-00000032.damaged", "step-00000003.old")
    for name in ("step-00000020", "step-00000003", "step-100000000", *others):
        write(root / name)
    assert [path.name for path in checkpoints(root)] == ["step-00000003", "step-00000020", "step-100000000"]
    assert resolve(tmp_path) == root / "step-100000000"
    assert resolve(root / "step-00000003") == root / "step-00000003"
    with pytest.raises(UserError, match="neither a checkpoint"):
        resolve(root)
