"""Documents → a corpus: the ids of each document, then EOS."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import numpy as np

from data_tools.sources import Document, Sources
from llada_train.config.errors import UserError
from llada_train.data.corpus import CorpusWriter, Manifest, corpus_files, token_dtype
from llada_train.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
BATCHES_PER_WORKER = 4  # waiting or done, so that memory does not grow with the input

Encoded = list[np.ndarray]  # one document each, EOS included


def tokenize(
    sources: Sources,
    tokenizer_folder: Path,
    output: Path,
    workers: int = 1,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda documents, tokens: None,
) -> Manifest:
    """Write the corpus `output`.bin, .idx and, last, .json; the same files whatever `workers` is.

    One worker is this process, whose tokenizer library uses all cores; more are processes of one core each.
    `report(documents, tokens)` is called now and then.

    Raises:
        UserError: the tokenizer is faulty, the output exists, there is no document, or a worker died.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    existing = [str(path) for path in corpus_files(output) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)}: already there; give another --output, or --overwrite to replace")
    text_bytes = 0

    def batches() -> Iterator[list[str]]:
        nonlocal text_bytes
        for batch in _batches(sources):
            text_bytes += sum(document.text_bytes for document in batch)
            yield [document.text for document in batch]

    dtype = token_dtype(tokenizer.vocab_size)
    if workers == 1:
        encoded: Generator[Encoded, None, None] = (_encode(tokenizer, dtype, texts) for texts in batches())
    else:
        encoded = _encode_in_processes(tokenizer_folder, workers, batches())
    # Closing ends the workers even where the writer fails.
    with closing(encoded), CorpusWriter(output, dtype) as writer:
        for documents in encoded:
            for tokens in documents:
                writer.add_document(tokens)
            report(writer.num_documents, writer.num_tokens)
        if not writer.num_documents:
            raise UserError(f"empty text: none of {len(sources.files)} files has a document{_why(sources)}")
    manifest = Manifest(
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        text_bytes=text_bytes,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=dtype.name,
        eos_id=tokenizer.eos_id,
    )
    manifest.save(output)
    return manifest


def _why(sources: Sources) -> str:
    return "".join(f"; {reason}: {count:,}" for reason, count in sources.rejected.items())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
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


def _encode(tokenizer: Tokenizer, dtype: np.dtype, texts: list[str]) -> Encoded:
    return [np.array([*ids, tokenizer.eos_id], dtype=dtype) for ids in tokenizer.encode_batch(texts)]


def _encode_in_processes(folder: Path, workers: int, batches: Iterator[list[str]]) -> Generator[Encoded, None, None]:
    """`_encode` of each batch, in order."""
    spawn = multiprocessing.get_context("spawn")
    pending: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, spawn, _start_worker, (folder,)) as pool:
        try:
            for texts in batches:
                pending.append(pool.submit(_encode_in_worker, texts))
                if len(pending) >= BATCHES_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError("a tokenizing process died, perhaps for want of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    _worker_tokenizer = Tokenizer.load(folder)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _encode(_worker_tokenizer, token_dtype(_worker_tokenizer.vocab_size), texts)
