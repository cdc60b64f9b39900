"""How far a command is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LOG_INTERVAL = 10.0  # seconds


class ByteProgress:
    """Progress through `total` bytes of input, on stderr. A context manager."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = self._last_line = time.monotonic()
        self._done_before: int | None = None
        self._tokens_before: int | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update_tokens(self, done: int, documents: int, tokens: int) -> None:
        """`done` of the bytes are read; so many documents and tokens came of them, earlier runs' included."""
        if self._tokens_before is None:
            self._tokens_before = tokens
        rate = (tokens - self._tokens_before) / max(time.monotonic() - self._started, 1e-9)
        self.update(done, f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s")

    def update(self, done: int, note: str = "") -> None:
        """`done` of the bytes are read; `note` says what came of them."""
        if self._bar:
            self._bar.update(self._task, completed=done, description=note)
            return
        if self._done_before is None:
            self._done_before = done
        now = time.monotonic()
        if done > self._done_before and now - self._last_line >= LOG_INTERVAL:
            self._last_line = now
            rate = (done - self._done_before) / (now - self._started)
            left = (self._total - done) / rate
            parts = [
                f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB",
                f"{rate / 1e6:.1f} MB/s",
                f"{left:,.0f} s left",
            ]
            print(", ".join([*parts, note] if note else parts), file=sys.stderr, flush=True)
