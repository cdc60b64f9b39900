"""A data set of dialogues, tokenized once: a folder that appears whole or not at all, named after what it was made of.

Each turn is two documents of a corpus, its context and its response; `first_turn.npy` says which turns a dialogue has.
"""

import fcntl
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from llada_train.config.errors import UserError
from llada_train.config.schema import CorpusConfig, SftConfig
from llada_train.data.chat import ChatTemplate, DialogueError, Turn
from llada_train.data.corpus import Corpus
from llada_train.data.corpus_writer import CorpusWriter, token_dtype
from llada_train.data.examples import Records
from llada_train.data.indexed import IndexedFile
from llada_train.data.progress import ByteProgress
from llada_train.data.tokenizer import Tokenizer

FORMAT = 1  # of the folder, and of what the same records give
_TURNS, _FIRST_TURN, _SUMMARY = "turns", "first_turn.npy", "summary.json"


class Summary(BaseModel):
    """What became of the records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: dict[str, str]
    dialogues: int
    unusable: dict[str, int]  # why → how many


class PreparedSet:
    def __init__(
        self, settings: CorpusConfig, sft: SftConfig, template: ChatTemplate, cache: Path, tokenizer: Tokenizer
    ) -> None:
        """Open it, or make it first; where several processes want to, one does and the others wait.

        Raises:
            UserError: there is no such data set, its shape is not known, a record is unusable and that is an error,
                none is usable, or the cache cannot be written.
        """
        records = Records(Path(settings.path), settings.columns)
        key = _fingerprint(records, template, sft, tokenizer)
        folder = cache / f"{re.sub(r'[^-.0-9A-Za-z]', '_', Path(settings.path).stem)}-{key[:16]}"
        if not folder.exists():
            with _alone(folder):
                if not folder.exists():
                    _write(folder, records, template, sft, tokenizer)
        prefix = str(folder / _TURNS)
        self.corpus = Corpus(prefix)
        self.corpus.prefix = settings.path  # what messages call it
        self.summary = Summary.model_validate_json((folder / _SUMMARY).read_text(encoding="utf-8"))
        self.first_turn: np.ndarray = np.load(folder / _FIRST_TURN, allow_pickle=False)
        """[dialogues + 1] int64."""
        lengths = IndexedFile(prefix).document_lengths(0, self.corpus.num_documents)
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])
        """[2 · turns + 1] int64: where each turn's context and response begin in the stream of tokens."""


def _fingerprint(records: Records, template: ChatTemplate, sft: SftConfig, tokenizer: Tokenizer) -> str:
    files = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in records.files]
    made_of = [FORMAT, files, records.columns.model_dump(), template.source, tokenizer.fingerprint, sft.unusable]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Until no other process makes this folder. A lock ends with its process, however that ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}; give a folder that this user may write to "
            "(sft.cache=…)"
        ) from None


def _write(folder: Path, records: Records, template: ChatTemplate, sft: SftConfig, tokenizer: Tokenizer) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir()
    unusable: Counter[str] = Counter()
    first_turn, turns = [0], 0
    try:
        with CorpusWriter(partial / _TURNS, token_dtype(tokenizer.vocab_size)) as writer:
            for place, found in _tokenized(records, template):
                if isinstance(found, DialogueError):
                    if sft.unusable == "error":
                        raise UserError(
                            f"{place}: {found}; mend it, or count and leave out such records with sft.unusable=drop"
                        )
                    unusable[str(found)] += 1
                    continue
                for turn in found:
                    writer.add_document(turn.context)
                    writer.add_document(turn.response)
                turns += len(found)
                first_turn.append(turns)
            if not turns:
                raise UserError(f"{records.path}: no usable record: {dict(unusable)}")
        np.save(partial / _FIRST_TURN, np.array(first_turn, np.int64))
        columns = records.columns.model_dump(exclude_none=True)
        summary = Summary(columns=columns, dialogues=len(first_turn) - 1, unusable=dict(unusable))
        (partial / _SUMMARY).write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenized(records: Records, template: ChatTemplate) -> Iterator[tuple[str, list[Turn] | DialogueError]]:
    done, dialogues = 0, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size

    with ByteProgress(records.size) as progress:
        for place, found in records.dialogues(advance):
            dialogues += 1
            progress.update(done, f"{dialogues:,} dialogues tokenized")
            if isinstance(found, DialogueError):
                yield place, found
                continue
            try:
                yield place, template.turns(found)
            except DialogueError as error:
                yield place, error
