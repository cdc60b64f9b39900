"""Where a run's numbers go: metrics.jsonl, TensorBoard, one console line, and a picture of the curves. Rank 0 only."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from llada_train.config.errors import UserError
from llada_train.data.training_data import CorpusPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "loss_curves.png"
TENSORBOARD_FOLDER = "tensorboard"

TOLD_CORPORA = 6  # more than these are in TensorBoard and metrics.jsonl only

KINDS = ("train", "validation", "samples", "skip", "went_back")

Record = dict[str, Any]


class MetricsLog:
    """Writes each record to metrics.jsonl and TensorBoard and tells it on the console.

    Losses and bounds are in nats per token, times in seconds per step. A log that cannot be written (disk full, folder
    read-only) is told on stderr and ends no run.
    """

    def __init__(self, run_dir: Path, resumed_step: int, end_tokens: int, console: Console | None = None) -> None:
        """Open the logs of `run_dir`. What they hold beyond `resumed_step` (0: all) is dropped, since it comes again.

        `end_tokens`: nominal tokens of the whole run, to tell how much is left.

        Raises:
            UserError: metrics.jsonl holds something else than metrics, or the logs cannot be written.
        """
        self._run_dir = run_dir
        self._end_tokens = end_tokens
        self._console = console or Console(highlight=False)
        self._open(resumed_step)

    def _open(self, resumed_step: int) -> None:
        path = self._run_dir / METRICS_FILE
        kept = [record for record in read_metrics(self._run_dir) if _is_before(record, resumed_step)]
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            temporary.replace(path)
            self._file = _LogFile(path)
            self._tensorboard = _TensorBoard(
                self._run_dir / TENSORBOARD_FOLDER, resumed_step + 1 if resumed_step else 0
            )
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: cannot be written: {error.strerror}; free some space or mend the folder's "
                "permissions, then run the same command again"
            ) from None

    def train(
        self,
        *,
        step: int,
        consumed_samples: int,
        tokens: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        tokens_per_second: float,
        model_flops_per_second: float,
        data_wait_seconds: float,
        step_seconds: float,
        step_seconds_median: float,
        step_seconds_p99: float,
        nelbo_by_t: Sequence[float | None],
    ) -> None:
        """Record an interval of training steps that ends with `step`; `tokens` are nominal.

        `step_seconds_median` and `step_seconds_p99` are of the run's recent steps, more than the interval's.
        `nelbo_by_t` splits the loss over equal buckets of t in [0, 1]; None where no sequence fell.
        """
        rates = {
            "tokens_per_second": tokens_per_second,
            "model_flops_per_second": model_flops_per_second,
            "data_wait_seconds": data_wait_seconds,
            "step_seconds": step_seconds,
            "step_seconds_median": step_seconds_median,
            "step_seconds_p99": step_seconds_p99,
        }
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        record = {"kind": "train", "step": step, "consumed_samples": consumed_samples, "tokens": tokens}
        self._append({**record, **values, **rates, "nelbo_by_t": list(nelbo_by_t)})
        self._scalars("train", step, values)
        self._scalars("speed", step, rates)
        self._scalars("train_nelbo_by_t", step, _by_t(nelbo_by_t))
        left = timedelta(seconds=round(max(0, self._end_tokens - tokens) / tokens_per_second))
        self._tell(
            f"[bold]step {step:>7,}[/]  tokens {_short(tokens):>6}  loss [bold]{loss:7.4f}[/]  lr {learning_rate:.2e}  "
            f"grad norm {grad_norm:6.3f}  {_short(tokens_per_second):>6} tokens/s  {left} left"
        )

    def validation(
        self,
        *,
        step: int,
        tokens: int,
        bound: float,
        bound_by_t: Sequence[float | None],
        bound_by_corpus: dict[str, float],
        exact_match: float | None = None,
    ) -> None:
        """Record the bound on the held-out documents after `step`: whole, over buckets of t, and of each corpus.

        `exact_match`: the share of held-out prompts that are answered exactly, if any were asked.
        """
        record: Record = {"kind": "validation", "step": step, "tokens": tokens, "bound": bound}
        if exact_match is not None:
            record["exact_match"] = exact_match
            self._scalars("validation", step, {"exact_match": exact_match})
        self._append({**record, "bound_by_t": list(bound_by_t), "bound_by_corpus": bound_by_corpus})
        self._scalars("validation", step, {"bound": bound})
        self._scalars("validation_bound_by_t", step, _by_t(bound_by_t))
        self._scalars("validation_bound_by_corpus", step, bound_by_corpus)
        told = ""
        if 1 < len(bound_by_corpus) <= TOLD_CORPORA:
            told = f"  ({', '.join(f'{escape(name)} {value:.4f}' for name, value in bound_by_corpus.items())})"
        if exact_match is not None:
            told += f"  [green]{exact_match:.1%} of answers exact[/]"
        self._tell(f"[bold]step {step:>7,}[/]  [green]held-out bound {bound:.4f} nats/token[/]{told}")

    def samples(self, *, step: int, tokens: int, texts: Sequence[tuple[str, str]]) -> None:
        """Record what the model wrote after each of some prompts: (prompt, text)."""
        told = [{"prompt": prompt, "text": text} for prompt, text in texts]
        self._append({"kind": "samples", "step": step, "tokens": tokens, "samples": told})
        self._tensorboard.add_texts(
            step, {f"samples/{number}": prompt + text for number, (prompt, text) in enumerate(texts)}
        )
        for prompt, text in texts:
            line = escape(json.dumps(_shortened(text), ensure_ascii=False))
            after = f" after {escape(json.dumps(_shortened(prompt), ensure_ascii=False))}" if prompt else ""
            self._tell(f"[bold]step {step:>7,}[/]  [cyan]sample{after}:[/] {line}")

    def skipped(self, *, step: int, consumed_samples: int, reason: str) -> None:
        """Record that `step` was not applied."""
        self._append({"kind": "skip", "step": step, "consumed_samples": consumed_samples, "reason": reason})
        self._tell(f"[bold]step {step:>7,}[/]  [yellow]not applied: {reason}[/]")

    def went_back(
        self, *, step: int, from_step: int, passed_over: tuple[int, int], reasons: Sequence[str] = ()
    ) -> None:
        """Drop what came after `step`, and record that the run went back there, to pass over samples [first, end)."""
        try:
            if not self._file.failing:  # else the steps will be there twice, but nothing is lost
                old = self._file, self._tensorboard
                self._open(step)
                for file in old:
                    file.close()
        except UserError as error:
            warn(f"{error}; the run goes on")
        first, end = passed_over
        record = {"kind": "went_back", "step": step, "from_step": from_step, "reasons": list(reasons)}
        self._append({**record, "first_sample": first, "end_sample": end})
        self._tell(
            f"[bold]step {from_step:>7,}[/]  [yellow]going back to step {step:,}, passing over samples {first:,} to "
            f"{end - 1:,}[/]"
        )

    def remark(self, step: int, text: str) -> None:
        """Tell something on the console only."""
        self._tell(f"[bold]step {step:>7,}[/]  [yellow]{text}[/]")

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def _append(self, record: Record) -> None:
        self._file.write(_line(record).encode())

    def _scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        self._tensorboard.add(step, {f"{group}/{name}": value for name, value in values.items()})

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # stdout may be a file on a disk that is full
            self._console.print(line, soft_wrap=True)


class _LogFile:
    """A file that is added to, unbuffered. What cannot be written is told once, kept, and tried again with the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self.failing = False

    def write(self, data: bytes) -> None:
        self._unwritten += data
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self.failing:
                warn(f"{self._path}: cannot be written: {error.strerror}; the run goes on and keeps trying")
            self.failing = True
        else:
            if self.failing:
                warn(f"{self._path}: is written again; nothing is missing")
            self.failing = False

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """An event file. TensorBoard's own writer works in a thread that the first failed write ends for good."""

    def __init__(self, folder: Path, purge_from: int) -> None:
        """What TensorBoard has read of earlier event files at steps from `purge_from` on is forgotten."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file = _LogFile(folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}.0")
        self._records = RecordWriter(self._file)
        start = SessionLog(status=SessionLog.START)
        for event in (
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=purge_from, session_log=start),
        ):
            self._records.write(event.SerializeToString())

    def add(self, step: int, values: dict[str, float]) -> None:
        self._write(step, [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def add_texts(self, step: int, texts: dict[str, str]) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        values = []
        for tag, text in texts.items():
            # TensorBoard reads Markdown, in which lines that are indented stand as they are.
            shown = "".join(f"    {line}\n" for line in text.splitlines()) or "    "
            tensor = make_tensor_proto([shown.encode()], shape=(1,))
            metadata = create_summary_metadata(display_name="", description="")
            values.append(self._summary.Value(tag=tag, metadata=metadata, tensor=tensor))
        self._write(step, values)

    def _write(self, step: int, values: list[Any]) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def plan_lines(plan: Sequence[CorpusPlan]) -> list[str]:
    """What the whole run reads of each corpus, a line each."""
    width = max(len(corpus.name) for corpus in plan)
    return [
        f"{corpus.name:<{width}}  {_short(corpus.size):>7} {corpus.unit} in the corpus, "
        f"{_short(corpus.run_size):>7} in the run: {corpus.share:7.2%}, {corpus.epochs:.3g} epochs"
        for corpus in plan
    ]


def warn(message: str) -> None:
    """On stderr, which may be a file on a full disk itself."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


def read_metrics(run_dir: Path) -> list[Record]:
    """The records of a run so far, in the order written; a last line that a kill cut off is left out.

    Raises:
        UserError: a line is not a record.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["kind"] not in KINDS or not isinstance(record["step"], int):
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a metrics record; mend the line, or remove it") from None
        records.append(record)
    return records


def plot_curves(run_dir: Path) -> Path:
    """Draw the run's losses and learning rate over nominal tokens; returns the PNG file.

    Raises:
        UserError: as `read_metrics`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    records = read_metrics(run_dir)
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    tokens = _column(train, "tokens")
    loss = _column(train, "loss")
    losses.plot(tokens, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    losses.plot(tokens, _running_mean(loss), color="tab:blue", label="training loss, running mean")
    held_out = _column(validation, "tokens"), _column(validation, "bound")
    losses.plot(*held_out, "o-", color="tab:orange", markersize=4, label="held-out bound")
    losses.set_ylabel("nats per token")
    losses.legend(frameon=False)
    rates.plot(tokens, _column(train, "learning_rate"), color="tab:gray")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("nominal tokens")
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        _plain(axes)

    path = run_dir / CURVES_FILE
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    return temporary.replace(path)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window, a tenth of the run wide and narrower towards both ends."""
    half, sums = len(values) // 20, [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _column(records: Iterable[Record], key: str) -> list[float]:
    return [record[key] for record in records]


def _by_t(values: Sequence[float | None]) -> dict[str, float]:
    """TensorBoard names of the buckets that hold something: 0.3-0.4 → value."""
    width = 1 / len(values)
    return {f"{i * width:.1f}-{(i + 1) * width:.1f}": v for i, v in enumerate(values) if v is not None}


def _is_before(record: Record, resumed_step: int) -> bool:
    """Had it happened when the checkpoint of `resumed_step` was saved? 0: there is none."""
    step: int = record["step"]
    return step < resumed_step or (step == resumed_step and record["kind"] != "went_back" and resumed_step > 0)


def _line(record: Record) -> str:
    # No NaN: the loop stops a run before it would log one, and JSON has none.
    return json.dumps(record, allow_nan=False) + "\n"


def _shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _short(number: float) -> str:
    """1234567 → 1.23M"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
