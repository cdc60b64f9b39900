"""Saving while training goes on, disks that fail, and what is loaded after damage: one process."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_files import CONFIG
from hypothesis import given
from hypothesis import strategies as st
from stand_in_engine import StandInEngine

from llada_train.checkpoint import store, tensor_file, writer
from llada_train.checkpoint.manifest import FILE_NAME, Progress
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.restore import load_newest
from llada_train.checkpoint.store import LATEST, already_aside, checkpoints, expired, folder_name
from llada_train.checkpoint.writer import CheckpointWriter
from llada_train.config.errors import UserError
from llada_train.config.schema import CheckpointConfig


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def new_engine(seed: int = 0, **settings: Any) -> StandInEngine:
    return StandInEngine(CONFIG.model_copy(update={"checkpoint": CheckpointConfig(**settings)}), seed)


def new_writer(root: Path, engine: StandInEngine) -> CheckpointWriter:
    return CheckpointWriter(root, engine)  # type: ignore[arg-type]


def at(step: int) -> Progress:
    return Progress(step=step, consumed_samples=4 * step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_holds(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with Checkpoint(folder) as checkpoint:
        checkpoint.verify(checkpoint.manifest.files)
        for key, expected in state.items():
            kind, _, name = key.partition("/")
            assert torch.equal(checkpoint.read_runs(name, kind, [(0, expected.numel())]), expected), key


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is set."""
    event = threading.Event()
    write = writer.write_tensors

    def wait_and_write(*arguments: Any) -> Any:
        assert event.wait(30)
        return write(*arguments)

    monkeypatch.setattr(writer, "write_tensors", wait_and_write)
    return event


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, gate: threading.Event) -> None:
    """What is saved is the state of the moment at which the save began."""
    engine = new_engine()
    saving = new_writer(tmp_path, engine)
    engine.optimizer_steps = 7
    before = engine.state()
    saving.start(at(7))
    assert saving.pending and saving.writing
    for _ in range(3):
        engine.step()
    assert checkpoints(tmp_path) == [] and not (tmp_path / LATEST).exists()
    gate.set()
    saving.finish()
    assert not saving.pending
    (folder,) = checkpoints(tmp_path)
    assert_holds(folder, before)
    with Checkpoint(folder) as checkpoint:
        assert (checkpoint.manifest.progress, checkpoint.manifest.optimizer_steps) == (at(7), 7)
        assert checkpoint.manifest.config == engine.config
        assert set(checkpoint.manifest.versions) == {"llada-train", "torch", "megatron-core", "deepspeed"}
    assert (tmp_path / LATEST).read_text() == f"{folder.name}\n"


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    engine = new_engine()
    saving = new_writer(tmp_path, engine)
    states = {}
    threading.Timer(0.3, gate.set).start()
    for step in (1, 2):
        engine.step()
        states[step] = engine.state()
        saving.start(at(step))
    assert [path.name for path in checkpoints(tmp_path)] == [folder_name(1)]
    saving.finish()
    for step, state in states.items():
        assert_holds(tmp_path / folder_name(step), state)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Writing fails while the list is not empty; each failure takes one item off."""
    failures: list[int] = []
    write = writer.write_tensors

    def fail_or_write(path: Path, *arguments: Any) -> Any:
        if failures:
            failures.pop()
            path.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(writer, "write_tensors", fail_or_write)
    return failures


def test_a_run_goes_on_when_the_disk_is_full_for_a_while(
    tmp_path: Path, full_disk: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    engine = new_engine(interval_steps=10, max_failures=3)
    saving = new_writer(tmp_path, engine)
    saving.save(at(10))
    before = engine.state()
    engine.step()
    for first in (20, 50):  # a save that succeeds starts the count anew
        full_disk += [0, 0]
        for step in (first, first + 10):
            saving.start(at(step))
            saving.finish()
            (told,) = capfd.readouterr().err.splitlines()
            assert told.startswith(f"warning: {tmp_path / folder_name(step)}") and "No space left" in told
            assert "10 steps" in told and f"number {(step - first) // 10 + 1}" in told
        assert names(tmp_path) == [LATEST, *(path.name for path in checkpoints(tmp_path))]  # no half of anything
        assert folder_name(first) not in names(tmp_path)
        saving.save(at(first + 20))
    assert_holds(tmp_path / folder_name(10), before)
    assert_holds(tmp_path / folder_name(70), engine.state())


def test_a_run_stops_when_saves_fail_again_and_again(tmp_path: Path, full_disk: list[int]) -> None:
    saving = new_writer(tmp_path, new_engine(max_failures=2))
    saving.save(at(1))
    full_disk += [0] * 9
    saving.start(at(2))
    saving.finish()
    saving.start(at(3))
    with pytest.raises(UserError, match=r"step-00000003: the checkpoint could not be written.*No space left"):
        saving.finish()
    assert names(tmp_path) == [LATEST, folder_name(1)]


@pytest.mark.parametrize(("failures", "saved"), [(1, True), (2, False)])
def test_the_last_save_is_tried_twice(tmp_path: Path, full_disk: list[int], failures: int, saved: bool) -> None:
    saving = new_writer(tmp_path, new_engine())
    full_disk += [0] * failures
    if saved:
        saving.save(at(1))
    else:
        with pytest.raises(UserError, match="could not be written"):
            saving.save(at(1))
    assert len(checkpoints(tmp_path)) == saved


def test_a_disk_that_changes_what_it_is_given_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read = tensor_file.sha256

    def flip_and_read(path: Path) -> str:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return read(path)

    monkeypatch.setattr(tensor_file, "sha256", flip_and_read)
    saving = new_writer(tmp_path, new_engine())
    saving.start(at(1))
    saving.finish()
    assert "what was read back is not what was written" in capfd.readouterr().err
    assert checkpoints(tmp_path) == []


def test_old_checkpoints_go_and_chosen_ones_stay(tmp_path: Path) -> None:
    saving = new_writer(tmp_path, new_engine(keep=2, keep_every_steps=4))
    (tmp_path / "step-00000001.tmp").mkdir()
    for step in range(1, 10):
        saving.save(at(step))
    saving._thread.shutdown()
    assert names(tmp_path) == [LATEST, *map(folder_name, (4, 8, 9))]


@given(steps=st.sets(st.integers(0, 50)), keep=st.integers(1, 8), every=st.none() | st.integers(1, 8))
def test_retention_is_the_newest_and_the_multiples(steps: set[int], keep: int, every: int | None) -> None:
    folders = [Path(folder_name(step)) for step in sorted(steps)]
    gone = {store.step_of(path) for path in expired(folders, keep, every)}
    newest = set(sorted(steps, reverse=True)[:keep])
    assert steps - gone == newest | {step for step in steps if every is not None and step % every == 0}


def test_remnants_of_killed_saves_go_and_other_things_stay(tmp_path: Path) -> None:
    new_writer(tmp_path, new_engine()).save(at(1))
    for name in ("step-00000002.tmp", "step-00000000.removed", "step-00000001.old", "step-00000003.damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"part")
    (tmp_path / "notes.txt").write_text("mine")
    new_writer(tmp_path, new_engine())
    assert names(tmp_path) == [LATEST, "notes.txt", folder_name(1), "step-00000003.damaged"]


def test_a_checkpoint_that_is_replaced_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames, the old one still counts, under its other name, and is replaced later."""
    engine = new_engine()
    new_writer(tmp_path, engine).save(at(1))
    old = engine.state()
    engine.step()
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            new_writer(tmp_path, engine).save(at(1))
    (folder,) = checkpoints(tmp_path)
    assert_holds(folder, old)
    saving = new_writer(tmp_path, engine)
    assert checkpoints(tmp_path) == [folder]
    saving.save(at(1))
    assert names(tmp_path) == [LATEST, folder_name(1)]
    assert_holds(tmp_path / folder_name(1), engine.state())


def flip(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])


def lose_a_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / FILE_NAME).unlink()


def change_a_number(folder: Path) -> None:
    """JSON as good as before, but the run would go on at another place."""
    path = folder / FILE_NAME
    path.write_text(path.read_text().replace('"consumed_samples": 12', '"consumed_samples": 16'))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, r"rank-00000\.safetensors: damaged: its checksum differs"),
    (cut, r"rank-00000\.safetensors: damaged: .*bytes"),
    (lose_a_file, r"rank-00000\.safetensors: damaged: the file is missing"),
    (lose_the_manifest, r"manifest\.json: damaged: there is no such file"),
    (change_a_number, r"manifest\.json: damaged: its checksum"),
]


@pytest.fixture
def three(tmp_path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The states saved at steps 1, 2 and 3."""
    engine = new_engine()
    saving, states = new_writer(tmp_path, engine), {}
    for step in (1, 2, 3):
        engine.step()
        saving.save(at(step))
        states[step] = engine.state()
    return states


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_the_newest_sound_checkpoint_is_taken_and_nothing_lost(
    tmp_path: Path,
    three: dict[int, dict[str, torch.Tensor]],
    damage: Callable[[Path], None],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(tmp_path / folder_name(3))
    left = {path.name: path.read_bytes() for path in (tmp_path / folder_name(3)).iterdir()}
    engine = new_engine(seed=9)
    assert load_newest(tmp_path, engine) == (tmp_path / folder_name(2), at(2))  # type: ignore[arg-type]
    assert engine.optimizer_steps == 2
    for key, state in engine.state().items():
        assert torch.equal(state, three[2][key]), key
    (told,) = capfd.readouterr().err.splitlines()
    assert told.endswith(f"kept as {folder_name(3)}.damaged, taking {folder_name(2)} instead")
    assert re.search(words, told)
    (aside,) = already_aside(tmp_path)
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left
    assert [path.name for path in checkpoints(tmp_path)] == [folder_name(1), folder_name(2)]


def test_without_a_sound_checkpoint_all_are_told_and_left(
    tmp_path: Path, three: dict[int, dict[str, torch.Tensor]]
) -> None:
    before = names(tmp_path)
    for step, damage in enumerate((flip, cut, lose_a_file), start=1):
        damage(tmp_path / folder_name(step))
    with pytest.raises(UserError, match="none of the run's checkpoints is sound") as error:
        load_newest(tmp_path, new_engine())  # type: ignore[arg-type]
    for step, words in ((1, "checksum"), (2, "bytes"), (3, "missing")):
        (line,) = [line for line in str(error.value).splitlines() if folder_name(step) in line]
        assert words in line
    assert "run_dir" in str(error.value) and "init_from" in str(error.value)
    assert names(tmp_path) == before


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none", new_engine()) is None  # type: ignore[arg-type]
