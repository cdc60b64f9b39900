"""Evaluation texts, read for decontamination: the hashed n-grams of every example of every task."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from data_tools.cleaning.words import bare_words, hash_ngrams, hash_words
from llada_train.config.errors import UserError


@dataclass(frozen=True)
class Evaluations:
    """G n-grams, sorted by hash; an n-gram of several examples is there several times."""

    ngram: int
    tasks: list[str]
    examples: list[int]  # of each task
    too_short: list[int]  # examples of each task that have no n-gram
    hashes: np.ndarray  # uint64[G]
    task: np.ndarray  # int32[G]
    example: np.ndarray  # int64[G], counted over all tasks

    @classmethod
    def read(cls, paths: Sequence[Path], ngram: int) -> "Evaluations":
        """Each file is a task, named like the file.

        Raises:
            UserError: a file cannot be read, or no example is long enough.
        """
        tasks = _task_names(paths)
        examples, too_short = [0] * len(paths), [0] * len(paths)
        parts: list[tuple[np.ndarray, int, int]] = []  # hashes, task, example
        number = 0
        for task, path in enumerate(paths):
            for texts in _examples(path):
                ngrams = [hash_ngrams(hash_words(bare_words(text)), ngram) for text in texts]
                unique = np.unique(np.concatenate([np.empty(0, np.uint64), *ngrams]))
                parts.append((unique, task, number))
                examples[task] += 1
                too_short[task] += not len(unique)
                number += 1
        if sum(examples) == sum(too_short):
            raise UserError(
                f"none of the {sum(examples):,} evaluation examples has {ngram} words in a row; try a smaller --ngram"
            )
        hashes = np.concatenate([part for part, _, _ in parts])
        order = np.argsort(hashes, kind="stable")
        lengths = [len(part) for part, _, _ in parts]
        return cls(
            ngram,
            tasks,
            examples,
            too_short,
            hashes[order],
            np.repeat(np.array([task for _, task, _ in parts], dtype=np.int32), lengths)[order],
            np.repeat(np.array([example for _, _, example in parts], dtype=np.int64), lengths)[order],
        )


def _task_names(paths: Sequence[Path]) -> list[str]:
    names = [path.name.partition(".jsonl")[0].removesuffix(".txt") for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _examples(path: Path) -> Iterator[list[str]]:
    """The texts of each example."""
    try:
        if path.suffix == ".txt":
            yield [path.read_text(encoding="utf-8")]
            return
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                try:
                    yield list(_strings(json.loads(line)))
                except UnicodeDecodeError:
                    raise
                except (ValueError, RecursionError):
                    raise UserError(f"{path}, line {number}: broken JSON") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid UTF-8") from None
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _lines(path: Path) -> list[bytes]:
    data = path.read_bytes()
    if path.name.endswith(".jsonl.gz"):
        data = gzip.decompress(data)
    elif path.name.endswith(".jsonl.zst"):
        data = b"".join(_frames(data))
    elif not path.name.endswith(".jsonl"):
        raise UserError(f"{path}: --against has to end in .jsonl, .jsonl.gz, .jsonl.zst or .txt")
    return data.split(b"\n")


def _frames(data: bytes) -> Iterator[bytes]:
    """The library's own reader takes a file that is cut for one that ends."""
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(data)
        if not frame.eof:
            raise EOFError("truncated")
        data = frame.unused_data


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
