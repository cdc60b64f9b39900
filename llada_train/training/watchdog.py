"""Finds a rank that hangs: no progress within a set time, and the stacks of all its threads are told before it ends.

Ranks that hang in one collective find it at the same time, and the one that they wait for finds it itself. Imports no
torch, so that the slow imports are watched as well.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from llada_train.parallel.launch import HUNG_EXIT_CODE

# A rank that has told stays so long: when it ends its connections break, and the others would have another story.
LINGER_SECONDS = 5.0
_STDERR = 2


class Watchdog:
    """A context manager: within it `beat` has to be called at least every `timeout_seconds`.

    Else the process writes its stacks to stderr and ends with HUNG_EXIT_CODE, whatever its other threads do. A thread
    that hangs and keeps Python's lock stops the watching thread too; then, a little later, the interpreter's own timer
    (faulthandler) writes the stacks and the process ends with 1.
    """

    def __init__(self, timeout_seconds: float, rank: int) -> None:
        self._timeout, self._rank = timeout_seconds, rank
        self._changed = threading.Condition()
        self._watching = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._last, self._doing = 0.0, ""

    def beat(self, doing: str) -> None:
        """Progress: what is done from now on, as the sentence "no progress for 60 s in …" ends. Costs 0.1 ms."""
        faulthandler.dump_traceback_later(self._timeout + 2 * LINGER_SECONDS, exit=True, file=_STDERR)
        with self._changed:
            self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> Self:
        self._watching = True
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._watching = False
            self._changed.notify()
        self._thread.join()  # if it tells of a hang, it ends the process: nothing that breaks meanwhile hides that
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._changed:
            while self._watching and (left := self._last + self._timeout - time.monotonic()) > 0:
                self._changed.wait(left)
            if not self._watching:
                return
            silent, doing = time.monotonic() - self._last, self._doing
        self._tell(f"{socket.gethostname()}: no progress for {silent:.0f} s in {doing}; the stacks of its threads:")
        for line in _stacks():
            self._tell(line)
        threading.Thread(target=self._tell_collectives, name="flight recorder", daemon=True).start()  # may hang, too
        time.sleep(LINGER_SECONDS)
        os._exit(HUNG_EXIT_CODE)

    def _tell_collectives(self) -> None:
        """torch's flight recorder, where TORCH_FR_BUFFER_SIZE turned it on, into the folder of this start's logs."""
        c10d, logs = sys.modules.get("torch._C._distributed_c10d"), os.environ.get("LLADA_ATTEMPT")
        backend = "nccl" if hasattr(c10d, "_dump_nccl_trace_json") else "fr"
        record = getattr(c10d, f"_dump_{backend}_trace_json", None)
        if record is None or logs is None:
            return
        path = Path(logs) / f"flight-recorder-{self._rank}.json"
        path.write_bytes(record())
        self._tell(f"its last collectives are in {path}")

    def _tell(self, line: str) -> None:
        """In one piece and with the rank, since all ranks tell at once; past sys.stderr, whose lock may be held."""
        with suppress(OSError):
            os.write(_STDERR, f"rank {self._rank}: {line}\n".encode(errors="replace"))


def _stacks() -> Iterator[str]:
    """Threads by name, the innermost call first. Source is not read: the file system may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for thread, frame in sys._current_frames().items():
        if thread != threading.get_ident():
            yield f"thread {names.get(thread, thread)}"
            for caller, line in traceback.walk_stack(frame):
                yield f'  File "{caller.f_code.co_filename}", line {line} in {caller.f_code.co_qualname}'
