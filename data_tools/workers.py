"""What processes that work on documents have in common."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator

from data_tools.sources import Document

BATCH_BYTES = 1 << 20


def belong_to_parent() -> None:
    """Makes this process end with the one that started it, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed leaves its pool waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """All documents, in lists of about a megabyte of text, or of one document."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.text_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
