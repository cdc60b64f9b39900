"""SIGTERM and SIGUSR1 ask a run to stop after the step in hand; all ranks agree on which step that is.

Imports no torch, so that the first thing that a process does can be to listen.
"""

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that a signal came. Any number of further signals changes nothing: what is being saved is saved."""

    def __init__(self) -> None:
        self._received = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def ignore(self) -> None:
        """From now on, even while the interpreter shuts down: the exit code says that all is saved."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self, device: "torch.device") -> bool:
        """Collective: has any rank been asked to stop? Signals reach ranks at different steps; the answer is one."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(self._received), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
