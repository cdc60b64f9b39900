"""A function over batches of documents, in this process or in many, always in order."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data_tools.sources import Document
from data_tools.workers import batched, belong_to_parent
from llada_train.config.errors import UserError

BATCHES_PER_WORKER = 4  # waiting or done, so that memory does not grow with the input

Result = TypeVar("Result")


def map_texts(
    function: Callable[[list[str]], list[Result]], documents: Iterable[Document], workers: int
) -> Iterator[tuple[Document, Result]]:
    """Each document with its result, in order. `function` gets batches of texts, and has to pickle if `workers` > 1.

    Raises:
        UserError: a worker died.
    """
    batches = batched(documents)
    if workers == 1:
        for batch in batches:
            yield from zip(batch, function([document.text for document in batch]), strict=True)
        return
    spawn = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[Document], Future[list[Result]]]] = deque()

    def oldest() -> Iterator[tuple[Document, Result]]:
        batch, future = pending.popleft()
        yield from zip(batch, future.result(), strict=True)

    with ProcessPoolExecutor(workers, spawn, _start_worker, (function,)) as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_run_in_worker, [document.text for document in batch])))
                if len(pending) >= BATCHES_PER_WORKER * workers:
                    yield from oldest()
            while pending:
                yield from oldest()
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for want of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_function: Callable[[list[str]], list[Any]]


def _start_worker(function: Callable[[list[str]], list[Any]]) -> None:
    global _worker_function
    belong_to_parent()
    _worker_function = function


def _run_in_worker(texts: list[str]) -> list[Any]:
    return _worker_function(texts)
