import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llada_train.checkpoint.manifest import FORMAT, Manifest, Progress, write_manifest
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.training.run_folder import RunFolder

PROGRESS = Progress(step=5, consumed_samples=80)


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(make_config: Callable[..., Path]) -> None:
    config = load_config(make_config())
    first = RunFolder(config)
    first.prepare()
    second = RunFolder(config.model_copy(update={"resume": "never"}))
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another run is at work in it; wait for it to end"):
        second.prepare()
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == before
    first.release()
    second.prepare()


@pytest.fixture
def begun(make_config: Callable[..., Path]) -> Path:
    """The config file of a run with a checkpoint after 5 steps (a manifest is all that the check reads)."""
    path = make_config()
    config = load_config(path)
    manifest = Manifest(
        format=FORMAT,
        corpora=(),
        saved=datetime.now(UTC),
        progress=PROGRESS,
        optimizer_steps=5,
        versions={},
        config=config,
        files={},
        tensors={},
    )
    folder = config.run_dir / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)
    return path


def test_an_unannounced_change_is_refused_with_what_differs(begun: Path) -> None:
    before = sorted(begun.parent.rglob("*"))
    changed = load_config(begun, ["training.global_batch_size=32", "objective.epsilon=0.01"])
    with pytest.raises(UserError) as caught:
        RunFolder(changed)
    assert str(caught.value).splitlines()[1:] == [
        "  objective.epsilon: 0.001 → 0.01",
        "  training.global_batch_size: 16 → 32",
        "announce changes of batch size, length and weights in `schedule`, from_tokens 2,560 or later; or give "
        "--accept-config-changes to go on with these settings; or give another run_dir, or the run's own settings",
    ]
    assert sorted(begun.parent.rglob("*")) == before


def test_an_accepted_change_is_noted_down_once(begun: Path) -> None:
    changed = load_config(begun, ["training.global_batch_size=32"])
    for _ in range(2):  # killed before its next checkpoint, and started again by the same command
        run = RunFolder(changed, accept_config_changes=True)
        assert run.accepted_changes == ["training.global_batch_size: 16 → 32"]
        run.prepare()
        run.record_changes(PROGRESS)
        run.release()
    (line,) = (run.path / "config_changes.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record.pop("date"))).total_seconds() < 60
    assert record == {"step": 5, "consumed_samples": 80, "changes": ["training.global_batch_size: 16 → 32"]}
    assert load_config(run.path / "config.yaml") == changed

    RunFolder(load_config(begun, ["objective.epsilon=0.01"]), accept_config_changes=True).record_changes(PROGRESS)
    assert len((run.path / "config_changes.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_what_was_accepted_once_needs_no_flag_if_a_checkpoint_from_before_is_gone_on_with(begun: Path) -> None:
    changed = load_config(begun, ["training.global_batch_size=32"])
    RunFolder(changed, accept_config_changes=True).prepare()
    assert RunFolder(changed).accepted_changes == ["training.global_batch_size: 16 → 32"]


def test_what_can_never_change_is_refused_even_so(begun: Path) -> None:
    changed = load_config(begun, ["seed=7", "objective.epsilon=0.01"])
    with pytest.raises(UserError) as caught:
        RunFolder(changed, accept_config_changes=True)
    assert "--accept" not in str(caught.value)
    _, first, second, last = str(caught.value).splitlines()
    assert first.startswith("  seed: 1234 → 7 (") and second == "  objective.epsilon: 0.001 → 0.01"
    assert last == "give another run_dir, or the run's own settings"


def test_without_changes_nothing_is_noted_down(begun: Path) -> None:
    run = RunFolder(load_config(begun, ["logging.interval_steps=3"]), accept_config_changes=True)
    run.record_changes(PROGRESS)
    assert run.accepted_changes == []
    assert not (run.path / "config_changes.jsonl").exists()
