"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to stop after the step in hand.

Imports no torch, so that the first thing that a process does can be to listen.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that a signal came. Any number of further signals changes nothing: what is being saved is saved."""

    def __init__(self) -> None:
        self.received = False  # by this process; signals reach the ranks at different steps
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def ignore(self) -> None:
        """From now on, even while the interpreter shuts down: the exit code says that all is saved."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
