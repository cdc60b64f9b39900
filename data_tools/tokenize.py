"""Documents → a corpus: the ids of each document, then EOS.

    inputs ── Sources.units ──▶ units of a few to some hundred MB, which depend on the inputs alone
      ── one process each ──▶ PREFIX.parts/NNNNN.{bin,idx}, then NNNNN.json, which says that the part is whole
      ── merge ─────────────▶ PREFIX.bin, PREFIX.idx, PREFIX.inputs.sha256 and, last, PREFIX.json

So the corpus is the same for any number of processes and machines, and after any number of interruptions.
"""

import contextlib
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from data_tools.encoder import choose, make_encoder
from data_tools.parts import PartReport, Parts, refuse_existing
from data_tools.sources import Sources, Tally, read_documents
from data_tools.workers import batched, belong_to_parent
from llada_train.config.errors import UserError
from llada_train.data.corpus import Manifest
from llada_train.data.corpus_writer import CorpusWriter, token_dtype
from llada_train.data.formats import Piece
from llada_train.data.tokenizer import Tokenizer

SAMPLE_UNITS, SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 4, 8, 20_000  # that the fast encoder is tried on

Unit = list[Piece]
Report = Callable[[int, int, int], None]  # bytes of input, documents, tokens


@dataclass(frozen=True)
class Shard:
    """The work of one machine: share `index`, from 0, of `count`."""

    index: int
    count: int

    def of(self, units: int) -> range:
        return range(units * self.index // self.count, units * (self.index + 1) // self.count)


def tokenize(
    sources: Sources,
    tokenizer_path: Path,
    output: Path,
    workers: int = 1,
    overwrite: bool = False,
    report: Report = lambda size, documents, tokens: None,
    tell: Callable[[str], None] = lambda line: None,
    shard: Shard | None = None,
) -> Manifest | None:
    """Write the corpus `output`.bin, .idx and, last, .json; the same files whatever `workers` is.

    One worker is this process, which uses all cores; more are processes of one core each. What an interrupted run has
    finished is not done again. Of a `shard` only the parts are written, for `merge`; then the result is None.
    `report` is called now and then with the sums so far; `tell` with a line on what is being done.

    Raises:
        UserError: the tokenizer is faulty, the output exists, there is no document, or a worker died.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    if not overwrite:
        refuse_existing(output)
    sources.refuse_output(output)
    sources.begin()
    units = sources.units()
    plan = {
        "units": [[[str(piece.file), piece.start, piece.stop] for piece in unit] for unit in units],
        "files": [[stat.st_size, stat.st_mtime_ns] for stat in sources.stats],
        "text_key": sources.text_key,
        "rejected": dict(sources.rejected),
    }
    with (
        _told_to_go_on(output),
        Parts.begin(output, plan, tokenizer, len(units), overwrite, alone=shard is None) as parts,
    ):
        here = shard.of(len(units)) if shard else range(len(units))
        missing = parts.missing(here)
        if len(missing) < len(here):
            tell(f"{len(here) - len(missing)} of {len(here)} parts were finished before")
        if missing:
            why_slow = choose(tokenizer, list(_sample(units, sources.text_key)))
            tell("encoding with tiktoken" if why_slow is None else f"encoding without tiktoken, since {why_slow}")
            job = Job(
                tokenizer_path,
                tokenizer.fingerprint,
                tokenizer.eos_id,
                tokenizer.mask_id,
                sources.text_key,
                parts.folder,
                token_dtype(tokenizer.vocab_size),
                why_slow is None,
            )
            progress = _Progress(report)
            for i in set(here) - set(missing):
                progress.add(_size(units[i]), parts.report(i))
            progress.tell()  # so that rates are those of this run
            for i, done in _encode(job, [(i, units[i]) for i in missing], workers, progress):
                parts.write_report(i, done)
        sources.refuse_changed()
        for i in here:
            sources.tally.include(parts.report(i).tally)
        return parts.merge() if shard is None else None


@contextlib.contextmanager
def _told_to_go_on(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a full disk
        raise UserError(
            f"{output}: {error}; when that is mended, the same command goes on from the parts that are finished"
        ) from None


def _size(unit: Unit) -> int:
    return sum(piece.size for piece in unit)


def _sample(units: list[Unit], text_key: str) -> Iterator[str]:
    """Beginnings of documents from several places of the input."""
    for unit in units[:: -(-len(units) // SAMPLE_UNITS)]:
        documents = (
            document for piece in unit for document in read_documents(piece, text_key, Tally(), lambda size: None)
        )
        for document in islice(documents, SAMPLE_DOCUMENTS):
            yield document.text[:SAMPLE_CHARACTERS]


class _Progress:
    """Sums for `report`."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.sums = np.zeros(3, dtype=np.int64)

    def add(self, size: int, part: PartReport) -> None:
        self.sums += (size, part.documents, part.tokens)

    def tell(self, more: tuple[int, int, int] = (0, 0, 0)) -> None:
        size, documents, tokens = (self.sums + more).tolist()
        self._report(size, documents, tokens)


@dataclass(frozen=True)
class Job:
    """What a process has to know to encode units."""

    tokenizer: Path
    fingerprint: str
    eos_id: int
    mask_id: int
    text_key: str
    folder: Path
    dtype: np.dtype
    fast: bool


class _Encoding:
    """Encodes units into parts; `stopped` is asked now and then."""

    def __init__(self, job: Job, all_cores: bool, stopped: Callable[[], bool]) -> None:
        """
        Raises:
            UserError: the tokenizer is not the one that the job was made for.
        """
        tokenizer = Tokenizer.load(job.tokenizer)
        if tokenizer.fingerprint != job.fingerprint:
            raise UserError(f"{job.tokenizer}: changed while it was in use; run the command again")
        self._job = job
        self._encoder = make_encoder(tokenizer, job.fast, all_cores)
        self._stopped = stopped

    def encode(self, i: int, unit: Unit, tell: Report = lambda size, documents, tokens: None) -> PartReport:
        """Write part i: all of it but its report."""
        tally = Tally()
        done = text_bytes = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size

        documents = (
            document for piece in unit for document in read_documents(piece, self._job.text_key, tally, advance)
        )
        batches = batched(documents)
        first = next(batches, None)
        num_documents = num_tokens = 0
        bin_sha256 = None
        if first is not None:
            with CorpusWriter(self._job.folder / f"{i:05d}", self._job.dtype) as writer:
                for batch in chain([first], batches):
                    for ids in self._encoder.encode([document.text for document in batch]):
                        if ((ids == self._job.eos_id) | (ids == self._job.mask_id)).any():
                            raise UserError(
                                f"{self._job.tokenizer}: made its mask or EOS token of text, in {unit[0].file} or a "
                                "file after it; give a tokenizer whose special tokens no text can produce"
                            )
                        writer.add_document(np.append(ids, self._job.eos_id))
                    text_bytes += sum(document.text_bytes for document in batch)
                    num_documents, num_tokens = writer.num_documents, writer.num_tokens
                    tell(done, num_documents, num_tokens)
                    if self._stopped():
                        raise KeyboardInterrupt
            bin_sha256 = writer.bin_hash.hexdigest()
        checksums = [(str(piece.file), _checksum(piece.file)) for piece in unit if not piece.start]
        known = [(file, checksum) for file, checksum in checksums if checksum]
        return PartReport(num_documents, num_tokens, text_bytes, bin_sha256, tally, known)


def _checksum(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _encode(
    job: Job, units: list[tuple[int, Unit]], workers: int, progress: _Progress
) -> Iterator[tuple[int, PartReport]]:
    """Write the parts, and give the report of each as soon as it is whole."""
    if workers == 1:
        encoding = _Encoding(job, all_cores=True, stopped=lambda: False)
        for i, unit in units:
            part = encoding.encode(i, unit, lambda *more: progress.tell(more))
            yield i, part
            progress.add(_size(unit), part)
            progress.tell()
        return
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    running: dict[Future[PartReport], tuple[int, Unit]] = {}
    waiting = iter(units)
    with ProcessPoolExecutor(min(workers, len(units)), spawn, _start_worker, (job, stop)) as pool:
        try:
            while True:
                for i, unit in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(_encode_in_worker, i, unit)] = i, unit
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i, unit = running.pop(future)
                    part = future.result()
                    yield i, part
                    progress.add(_size(unit), part)
                    progress.tell()
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process died, perhaps for want of memory; try fewer --workers; the same command goes on "
                "from what is finished"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


_worker: Callable[[], _Encoding]


def _start_worker(job: Job, stop: Event) -> None:
    global _worker
    belong_to_parent()
    # Made by the first unit, since what an initializer raises does not reach the user.
    _worker = cache(lambda: _Encoding(job, all_cores=False, stopped=stop.is_set))


def _encode_in_worker(i: int, unit: Unit) -> PartReport:
    with contextlib.suppress(KeyboardInterrupt):
        return _worker().encode(i, unit)
    raise UserError("stopped")
