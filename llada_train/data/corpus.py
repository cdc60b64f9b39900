"""A tokenized corpus: PREFIX.bin and PREFIX.idx in Megatron's format (llada_train.data.indexed), and PREFIX.json.

PREFIX.json, the manifest, is ours; corpora made by Megatron's tools have none.
"""

import glob
import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from llada_train.config.errors import UserError
from llada_train.data.indexed import IndexedFile
from llada_train.data.storage import exists, is_remote, matches, open_file

SAMPLED_PLACES, SAMPLED_LENGTH = 16, 1024  # of a corpus, looked at when it is opened
AT_ONCE = 32  # requests to a remote storage

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Checksums(BaseModel):
    """sha256, in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    bin: str
    idx: str
    inputs: str  # of PREFIX.inputs.sha256, which has the checksum of each input file


class Manifest(BaseModel):
    """What PREFIX.json says of a corpus: enough to check it against a tokenizer and to report bits per byte."""

    model_config = ConfigDict(frozen=True)

    documents: int
    tokens: int  # with the EOS after each document
    text_bytes: int  # of the documents, in UTF-8
    tokenizer_fingerprint: str
    vocab_size: int  # of the tokenizer: all ids are below
    dtype: str
    eos_id: int
    rejected: dict[str, int]  # reason → documents that were left out
    checksums: Checksums | None  # none for several corpora that are read as one

    @property
    def made_with(self) -> tuple[str, str, int]:
        """What the parts of one corpus share."""
        return self.tokenizer_fingerprint, self.dtype, self.eos_id

    def save(self, prefix: Path) -> None:
        """Write PREFIX.json, beside and renamed."""
        path = corpus_files(prefix)[-1]
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


class CorpusIdentity(BaseModel):
    """Of the corpus that a run began with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    documents: int
    sampled_sha256: str


def corpus_files(prefix: Path) -> list[Path]:
    """The paths that a corpus at `prefix` consists of, whether or not they exist."""
    # Path.with_suffix would cut "web.v2" to "web"
    return [prefix.parent / f"{prefix.name}{suffix}" for suffix in (".bin", ".idx", ".json")]


class Corpus:
    """A corpus on disk or in a remote storage: one stream of tokens, cut into documents.

    `prefix` may be a pattern with `*`, `?` or `[…]`: the files that fit it, in the order of their names, are then one
    stream. Opening reads a few pages at any size. Local files stay open, so that a corpus that is removed under a run
    goes on being read.
    """

    def __init__(self, prefix: str | Path) -> None:
        """
        Raises:
            UserError: a file is missing, truncated, of another format, or the two do not belong together.
        """
        self.prefix = str(prefix)
        self.remote = is_remote(self.prefix)
        opened = self._at_once(lambda path: (file := IndexedFile(path), _manifest(file)), _prefixes(self.prefix))
        self._files = [file for file, _ in opened]
        self.manifests = {file.prefix: manifest for file, manifest in opened if manifest is not None}
        """Those that there are, by the prefix of their file."""
        self._token_ends = list(accumulate(file.num_tokens for file in self._files))
        self._document_ends = list(accumulate(file.num_documents for file in self._files))
        self.num_tokens, self.num_documents = self._token_ends[-1], self._document_ends[-1]
        self.dtype = np.result_type(*(file.dtype for file in self._files))

    @property
    def files(self) -> dict[str, tuple[int, int]]:
        """The files that it consists of, in order: prefix → (tokens, documents)."""
        return {file.prefix: (file.num_tokens, file.num_documents) for file in self._files}

    @property
    def manifest(self) -> Manifest | None:
        """PREFIX.json, of several files the sum of theirs; None if one has none.

        Raises:
            UserError: one was made with another tokenizer than the others.
        """
        found = list(self.manifests.values())
        for prefix, manifest in self.manifests.items():
            if manifest.made_with != found[0].made_with:
                raise UserError(
                    f"{prefix}: was not tokenized like {next(iter(self.manifests))}, which {self.prefix} takes for a "
                    "part of the same corpus; tokenize it again, or give two corpora"
                )
        if len(found) < len(self._files):
            return None
        sums = {key: sum(getattr(manifest, key) for manifest in found) for key in ("documents", "tokens", "text_bytes")}
        rejected = sum((Counter(manifest.rejected) for manifest in found), Counter[str]())
        one = found[0].checksums if len(found) == 1 else None
        return found[0].model_copy(update={**sums, "rejected": dict(rejected), "checksums": one})

    @cached_property
    def identity(self) -> "CorpusIdentity":
        """What tells this corpus from another one, at the price of a few reads; however it is cut into files.

        Raises:
            UserError: as `tokens`.
        """
        digest = hashlib.sha256()
        for tokens in self.sample:
            digest.update(tokens.astype("<i8").tobytes())
        digest.update(np.array([self.document_start(i) for i in self._spread_documents], "<i8").tobytes())
        return CorpusIdentity(tokens=self.num_tokens, documents=self.num_documents, sampled_sha256=digest.hexdigest())

    @cached_property
    def sample(self) -> list[np.ndarray]:
        """Some stretches of tokens, spread evenly over the stream; always the same ones.

        Raises:
            UserError: as `tokens`.
        """
        last = max(0, self.num_tokens - SAMPLED_LENGTH)
        starts = sorted({last * i // (SAMPLED_PLACES - 1) for i in range(SAMPLED_PLACES)})
        return self.read([(start, min(start + SAMPLED_LENGTH, self.num_tokens)) for start in starts])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, read-only. Safe to call from several threads.

        Raises:
            IndexError: the range does not lie in [0, num_tokens].
            UserError: a file was cut or became unreadable since it was opened.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a corpus of {self.num_tokens}")
        first = min(bisect_right(self._token_ends, start), len(self._files) - 1)
        parts, begins = [], self._token_ends[first] - self._files[first].num_tokens
        for file in self._files[first:]:
            parts.append(file.tokens(max(start - begins, 0), min(stop - begins, file.num_tokens)))
            begins += file.num_tokens
            if begins >= stop:
                break
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts)
        joined.flags.writeable = False
        return joined

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """`tokens` of each range; from a remote storage many at once.

        Raises:
            IndexError, UserError: as `tokens`.
        """
        return self._at_once(lambda ends: self.tokens(*ends), ranges)

    def _at_once(self, ask: Callable[[Question], Answer], questions: Sequence[Question]) -> list[Answer]:
        """`ask` of each; where the answers come from far, of many at a time."""
        if not self.remote:
            return [ask(question) for question in questions]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, questions))

    @property
    def _spread_documents(self) -> list[int]:
        last = self.num_documents - 1
        return sorted({last * i // (SAMPLED_PLACES - 1) for i in range(SAMPLED_PLACES)})

    @property
    def sampled_documents(self) -> list[int]:
        """Some documents, spread evenly, and the last one of each file."""
        return sorted({*self._spread_documents, *(end - 1 for end in self._document_ends if end)})

    def document_ends(self, documents: Sequence[int]) -> list[int | None]:
        """The last token of each document; None of an empty one.

        Raises:
            UserError: as `tokens`.
        """

        def end_of(i: int) -> int | None:
            start, end = self.document_start(i), self.document_start(i + 1)
            return int(self.tokens(end - 1, end)[0]) if end > start else None

        return self._at_once(end_of, documents)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, its EOS included, read-only.

        Raises:
            IndexError: i does not lie in [0, num_documents).
            UserError: as `tokens`.
        """
        return self.tokens(self.document_start(i), self.document_start(i + 1))

    def document_start(self, i: int) -> int:
        """Where document i begins in the stream, in tokens; the stream's end for i = num_documents.

        Raises:
            IndexError: i does not lie in [0, num_documents].
            UserError: as `tokens`, of the index.
        """
        if not 0 <= i <= self.num_documents:
            raise IndexError(f"document {i} of a corpus of {self.num_documents}")
        if i == self.num_documents:
            return self.num_tokens
        number = bisect_right(self._document_ends, i)
        file = self._files[number]
        within = i - (self._document_ends[number] - file.num_documents)
        return self._token_ends[number] - file.num_tokens + file.document_start(within)

    def document_at(self, token: int) -> int:
        """The document that token 0 … num_tokens − 1 of the stream belongs to; a binary search in the index.

        Raises:
            UserError: as `tokens`, of the index.
        """
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1


def _prefixes(prefix: str) -> list[str]:
    """The files that a prefix or pattern stands for."""
    if is_remote(prefix) and "?" in prefix:
        raise UserError(f"{prefix}: a URL with a query has no place for .bin and .idx; give one without")
    if not glob.has_magic(prefix) or exists(f"{prefix}.idx"):
        return [prefix]
    found = [path.removesuffix(".idx") for path in matches(prefix + ".idx")]
    if not found:
        raise UserError(f"{prefix}: no corpus: no file fits {prefix}.idx")
    return found


def _manifest(file: IndexedFile) -> Manifest | None:
    path = f"{file.prefix}.json"
    if not exists(path):
        return None
    stored = open_file(path)
    try:
        manifest = Manifest.model_validate_json(stored.read(0, stored.size))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "file"
        raise UserError(f"{path}: not a corpus manifest: {place}: {problem['msg']}; tokenize again") from None
    if (manifest.documents, manifest.tokens) != (file.num_documents, file.num_tokens):
        raise UserError(
            f"{path}: describes {manifest.documents:,} documents with {manifest.tokens:,} tokens, "
            f"but the corpus has {file.num_documents:,} with {file.num_tokens:,}; "
            "copy all three files, or tokenize again"
        )
    return manifest
