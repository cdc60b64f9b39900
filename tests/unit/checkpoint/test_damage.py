"""Crafted, flipped and cut files: equal data or one error that names the file, and never a large allocation."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import KINDS, SPECS, TENSORS, write, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llada_train.checkpoint.manifest import CHECKSUM_NAME, FILE_NAME, DamagedError, FileEntry
from llada_train.checkpoint.reader import Checkpoint, open_verified
from llada_train.checkpoint.store import FOLDER
from llada_train.checkpoint.tensor_file import TensorFile, sha256, write_tensors
from llada_train.config.errors import UserError

SIZES = {"master/a": 5, "master/b": 3}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a checkpoint."""
    folder = write(tmp_path_factory.mktemp("sound") / "step-00000003")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flip_or_cut_is_found_or_harmless(
    sound: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from(sorted(sound)))
    content = bytearray(sound[name])
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[place] ^= data.draw(st.integers(1, 255))
    for file, original in sound.items():
        (folder / file).write_bytes(content if file == name else original)
    try:
        with open_verified(folder) as checkpoint:
            assert checkpoint.manifest.progress.step == 3
            for tensor in checkpoint.names():
                assert torch.equal(checkpoint.read(tensor), TENSORS[f"master/{tensor}"])
            # Only what stands beside the checksum in its file may differ: it says nothing.
            assert content == sound[name] or name == CHECKSUM_NAME
    except UserError as error:
        assert str(error).startswith(str(folder))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_that_fits_its_checksum_may_still_be_nonsense(
    sound: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """As above without the checksums' help: what is read is an error or numbers, never a crash."""
    folder = tmp_path_factory.mktemp("crafted")
    name = data.draw(st.sampled_from(sorted(set(sound) - {CHECKSUM_NAME})))
    content = bytearray(sound[name])
    place = data.draw(st.integers(0, min(len(content) - 1, 4000)))
    content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    for file, original in sound.items():
        (folder / file).write_bytes(content if file == name else original)
    tree = (folder / FILE_NAME).read_bytes()
    if name != FILE_NAME:
        manifest = json.loads(tree)
        manifest["files"][name] = FileEntry(size=len(content), sha256=sha256(folder / name)).model_dump()
        tree = json.dumps(manifest).encode()
    write_text(folder, tree)
    try:
        with Checkpoint(folder) as checkpoint:
            for tensor, spec in SPECS.items():
                for kind in KINDS:
                    assert checkpoint.read_runs(tensor, kind, [(0, spec.numel)]).shape == (spec.numel,)
    except UserError as error:
        assert str(error).startswith(str(folder))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=5))
def test_the_safetensors_library_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    data = torch.randn(sum(sizes))
    named = {f"master/t{i}": size for i, size in enumerate(sizes)}
    entry = write_tensors(path, named, [data[:1], data[1:]])
    assert entry == FileEntry(size=path.stat().st_size, sha256=sha256(path))
    found = load_file(path)
    assert found.keys() == named.keys()
    for name, expected in zip(named, data.split(sizes), strict=True):
        assert torch.equal(found[name], expected)


def header(text: bytes, length: int | None = None, data: bytes = b"\0" * 32) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entries(**changes: Any) -> bytes:
    tree: dict[str, Any] = {
        "master/a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]},
        "master/b": {"dtype": "F32", "shape": [3], "data_offsets": [20, 32]},
    }
    tree["master/b"] |= changes
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 5, id="shorter than a length"),
        pytest.param(header(entries(), 2**63), id="huge header"),
        pytest.param(header(entries(), len(entries()) + 33), id="header beyond the end"),
        pytest.param(header(b"[" * 100_000), id="deep header"),
        pytest.param(header(b"null"), id="no object"),
        pytest.param(header(entries() + b"}"), id="two objects"),
        pytest.param(header(entries(dtype="F16")), id="another type"),
        pytest.param(header(entries(dtype="F64", data_offsets=[20, 44]), data=b"\0" * 44), id="longer type"),
        pytest.param(header(entries(shape=[4])), id="longer shape"),
        pytest.param(header(entries(shape=[3, 1])), id="another shape"),
        pytest.param(header(entries(shape=[-3])), id="negative shape"),
        pytest.param(header(entries(shape=[2**64])), id="shape beyond int64"),
        pytest.param(header(entries(data_offsets=[0, 12]), data=b"\0" * 20), id="overlap"),
        pytest.param(header(entries(data_offsets=[24, 36]), data=b"\0" * 36), id="gap"),
        pytest.param(header(entries(data_offsets=[32, 20])), id="backwards"),
        pytest.param(header(entries(), data=b"\0" * 33), id="trailing garbage"),
        pytest.param(header(entries(), data=b"\0" * 31), id="cut"),
        pytest.param(header(b"{}", data=b""), id="tensors missing"),
        pytest.param(header(entries(extra=1)), id="unknown key"),
    ],
)
def test_crafted_tensor_file_is_refused_without_allocating(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedError) as error:
        TensorFile(path, SIZES)
    assert str(error.value).startswith(f"{path}: damaged")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_the_crafted_files_are_refused_for_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(entries()))
    TensorFile(path, SIZES).close()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """A file that torch.load would run code from is bytes like any other."""
    path = tmp_path / "x.safetensors"
    torch.save({"master/a": torch.zeros(5)}, path)
    with pytest.raises(DamagedError):
        TensorFile(path, SIZES)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda tensors: {**tensors, "surprise": torch.zeros(1)},
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        lambda tensors: {name: tensor[:-1] for name, tensor in tensors.items()},
    ],
    ids=["one more", "one less", "another type", "shorter"],
)
def test_other_tensors_than_the_manifest_lists_are_found(tmp_path: Path, tamper: Callable[[Any], Any]) -> None:
    folder = write(tmp_path / "step-00000003")
    file = folder / "rank-00001.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tamper(load_file(file)).items()}, file)
    tree = json.loads((folder / FILE_NAME).read_text())
    tree["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    write_text(folder, json.dumps(tree).encode())
    with pytest.raises(DamagedError, match=r"rank-00001|too small"), open_verified(folder):
        pass


def test_a_damaged_checkpoint_is_told_with_another_that_is_whole(tmp_path: Path) -> None:
    root = tmp_path / FOLDER
    root.mkdir()
    for step in (3, 6, 9, 12):
        write(root / f"step-{step:08d}", step=step)
    (root / "step-00000012" / "rank-00000.safetensors").unlink()
    (root / "step-00000009" / FILE_NAME).write_text("{}")
    for path in (tmp_path, root / "step-00000012"):
        words = r"rank-00000\.safetensors.*missing.*give .*step-00000006"
        with pytest.raises(DamagedError, match=words), open_verified(path):
            pass
