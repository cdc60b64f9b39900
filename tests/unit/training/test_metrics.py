import errno
import io
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llada_train.config.errors import UserError
from llada_train.training.metrics import CURVES_FILE, METRICS_FILE, MetricsLog, plot_curves, read_metrics

END = 4096 * 1000  # tokens of the run


def write(log: MetricsLog, steps: range, loss: float = 2.5) -> None:
    for step in steps:
        log.train(
            step=step,
            consumed_samples=64 * step,
            tokens=8192 * step,
            loss=loss,
            learning_rate=1e-3,
            grad_norm=0.5,
            tokens_per_second=4096.0,
            model_flops_per_second=1e9,
            data_wait_seconds=0.01,
            step_seconds=2.0,
            step_seconds_median=1.9,
            step_seconds_p99=2.6,
            nelbo_by_t=[0.1 * i for i in range(9)] + [None],
        )
        log.validation(
            step=step, tokens=8192 * step, bound=3.0, bound_by_t=[0.3] * 10, bound_by_corpus={"web": 2.5, "code": 3.5}
        )


def tensorboard(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard itself would show."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]


def test_every_sink_has_every_interval(tmp_path: Path) -> None:
    told = io.StringIO()
    log = MetricsLog(tmp_path, 0, END, Console(file=told, width=20))
    write(log, range(1, 4))
    on_disk_before_close = (tmp_path / METRICS_FILE).read_text().splitlines()
    log.close()

    assert len(on_disk_before_close) == 6  # a killed run loses nothing
    first: dict[str, Any] = json.loads(on_disk_before_close[0])
    assert first["kind"] == "train"
    assert (first["step"], first["consumed_samples"], first["tokens"], first["loss"]) == (1, 64, 8192, 2.5)
    assert first["nelbo_by_t"][9] is None
    assert tensorboard(tmp_path, "train/loss") == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert tensorboard(tmp_path, "train/learning_rate")[0] == (1, 1e-3)
    assert tensorboard(tmp_path, "train_nelbo_by_t/0.3-0.4")[0] == (1, 0.3)
    assert tensorboard(tmp_path, "validation/bound")[2] == (3, 3.0)
    lines = told.getvalue().splitlines()
    assert len(lines) == 6  # one line each, however narrow the terminal
    assert "\x1b" not in told.getvalue()  # plain text where there is no terminal
    assert "2.5000" in lines[0]
    assert f"{timedelta(seconds=(END - 8192) // 4096)} left" in lines[0]


def test_resuming_drops_what_comes_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, END, Console(file=io.StringIO()))
    write(log, range(1, 7), loss=2.0)
    log.close()
    log = MetricsLog(tmp_path, 4, END, Console(file=io.StringIO()))
    write(log, range(5, 8), loss=1.0)
    log.close()

    train = [(r["step"], r["loss"]) for r in read_metrics(tmp_path) if r["kind"] == "train"]
    expected = [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 1.0), (6, 1.0), (7, 1.0)]
    assert train == expected
    assert tensorboard(tmp_path, "train/loss") == expected


def test_a_run_without_a_checkpoint_starts_its_logs_again(tmp_path: Path) -> None:
    for loss in (2.0, 1.0):
        log = MetricsLog(tmp_path, 0, END, Console(file=io.StringIO()))
        write(log, range(1, 3), loss)
        log.close()
    assert [r["loss"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == [1.0, 1.0]
    assert tensorboard(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_last_line_cut_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    log = MetricsLog(tmp_path, 0, END, Console(file=io.StringIO()))
    write(log, range(1, 4))
    log.close()
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text()[:-cut])
    log = MetricsLog(tmp_path, 3, END, Console(file=io.StringIO()))
    write(log, range(4, 5))
    log.close()
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)][-4:] == [
        ("validation", 2),
        ("train", 3),
        ("train", 4),
        ("validation", 4),
    ]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"kind": "train", "step": "1"}', '{"kind": "other", "step": 1}', ""]
)
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS_FILE).write_text('{"kind": "validation", "step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_curves_are_a_picture(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, END, Console(file=io.StringIO()))
    write(log, range(1, 60))
    log.close()
    path = plot_curves(tmp_path)
    assert path == tmp_path / CURVES_FILE
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {(31, 119, 180), (255, 127, 14), (127, 127, 127)} <= colours  # training loss, bound, learning rate
    assert not list(tmp_path.glob("*.tmp"))


def test_curves_of_a_run_that_logged_nothing_yet(tmp_path: Path) -> None:
    with Image.open(plot_curves(tmp_path)) as picture:
        picture.verify()


def test_a_full_disk_is_told_once_and_nothing_is_missing_when_it_has_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, 0, END, Console(file=io.StringIO()))
    write(log, range(1, 2))
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    with no_file_larger_than(min(sizes) + 100):  # in the middle of a record
        write(log, range(2, 5))
    log_file = tmp_path / METRICS_FILE
    assert sorted(warnings(capfd)) == sorted(
        f"warning: {path}: cannot be written: File too large; the run goes on and keeps trying"
        for path in (log_file, next((tmp_path / "tensorboard").iterdir()))
    )
    assert not log_file.read_text().endswith("\n")
    write(log, range(5, 6))
    log.close()
    assert [line.partition(": is ")[2] for line in warnings(capfd)] == ["written again; nothing is missing"] * 2
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [step for step, _ in tensorboard(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]


def test_a_console_on_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(tmp_path, 0, END, Console(file=Full()))
    write(log, range(1, 3))
    log.close()
    assert len(read_metrics(tmp_path)) == 4


@pytest.mark.parametrize("name", [METRICS_FILE, "tensorboard"])
def test_logs_that_cannot_be_begun_are_a_user_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run" if name == METRICS_FILE else tmp_path
    if name == "tensorboard":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{run}/.*: cannot be written: (Not a directory|File exists)"):
        MetricsLog(run, 0, END, Console(file=io.StringIO()))


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def warnings(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()
