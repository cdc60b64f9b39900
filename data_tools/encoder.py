"""Text → ids by the fastest way that gives the tokenizer's own ids.

tiktoken encodes byte-level BPE several times faster than `tokenizers` does, but takes another description of it: a
rank for each token's bytes, where `tokenizers` has a list of merges. It joins any two neighbours whose bytes together
are a token, the lowest rank first; `tokenizers` joins the listed pairs only. Both give the same where

1. ranks are the order in which the merges first make a token, and each merge joins tokens that earlier ones made, and
2. each token's own bytes, encoded by the merges alone, are that one token.

For then both go through the merges from the lowest rank to the highest, and two neighbours x, y whose bytes are a token
T are never met when it is T's turn unless the list has this pair: neighbours that have come about encode to [x, y] when
alone, too, while T's bytes, when it is T's turn, are the two parts of T's merge. `FastEncoder` checks both conditions
and everything else that could differ; `choose` compares the two on a sample as well.
"""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers

from llada_train.data.tokenizer import Tokenizer
from llada_train.data.tokenizer_backends import BYTE_OF_CHARACTER

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of pre_tokenizers.ByteLevel
)
# What the two libraries' regular expressions are known to read alike; a test compares the classes over all of Unicode.
_ESCAPE = re.compile(r"\\(?:[pP]\{(?:[LNMPSZ]|L[ultmo]|Nd|Han)\}|[sSdnrtfv]|[^\w\s<>])")
_CLASS = re.compile(r"\[(?:(?!--|~~|&&)[^\[\]])*\]")
_CONTRACTIONS = re.compile(r"\(\?i:(?:'(?:s|t|re|ve|m|ll|d)\|?)+\)")  # for others each has its own idea of case
_DOUBTFUL = re.compile(r"[\\^$\[\]]|\(\?<|\(\?[-a-z]|\}[+?]|\{,")

Ids = np.ndarray


class NotCarriedOverError(Exception):
    """tiktoken cannot be this tokenizer; the message is why."""


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, nothing added."""
        ...


class SlowEncoder:
    """The tokenizer's own library, with as many threads as it takes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(ids, dtype=np.int64) for ids in self._tokenizer.encode_batch(texts)]


class FastEncoder:
    """tiktoken, set up to give the same ids; the few texts that it cannot take go to the tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer, check: bool = True, threads: int = 1) -> None:
        """
        Raises:
            NotCarriedOverError: it might not give the same ids. Without `check`, the vocabulary is taken as checked.
        """
        definition = tokenizer.definition
        if definition is None:
            raise NotCarriedOverError("it is a sentencepiece model")
        self._slow = SlowEncoder(tokenizer)
        ranks, ids = _ranks(definition["model"])
        if check:
            _check_vocabulary(definition["model"], ids)
        literal = [token["content"] for token in definition["added_tokens"] if not token["special"]]
        self._literal = re.compile("|".join(map(re.escape, literal))) if literal else None
        pattern = _pattern(definition)
        # tiktoken drops what the pattern leaves out; `tokenizers` keeps it, as words of its own.
        pattern = f"{pattern}|(?:(?!{pattern})[\\s\\S])+"
        self._tiktoken = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._id_of_rank = np.array(ids)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return list(self._pool.map(self._encode, texts) if self._pool else map(self._encode, texts))

    def _encode(self, text: str) -> Ids:
        if self._literal is None or not self._literal.search(text):
            try:
                return self._id_of_rank[self._tiktoken.encode_to_numpy(text, disallowed_special=())]
            except ValueError:  # the regular expression gives up, as on a million spaces in a row
                pass
        return self._slow.encode([text])[0]


def choose(tokenizer: Tokenizer, sample: Sequence[str]) -> str | None:
    """Why `FastEncoder` cannot be used, or None if it can: it gives the same ids on `sample`, too."""
    try:
        fast = FastEncoder(tokenizer)
    except NotCarriedOverError as reason:
        return str(reason)
    for ours, theirs in zip(fast.encode(sample), SlowEncoder(tokenizer).encode(sample), strict=True):
        if not np.array_equal(ours, theirs):
            return "its ids differ on a sample of the text"
    return None


def make_encoder(tokenizer: Tokenizer, fast: bool, all_cores: bool) -> Encoder:
    """`fast` as `choose` found for this tokenizer."""
    if not fast:
        if not all_cores:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return SlowEncoder(tokenizer)
    return FastEncoder(tokenizer, check=False, threads=len(os.sched_getaffinity(0)) if all_cores else 1)


def _pattern(definition: dict[str, Any]) -> str:
    """The regular expression that cuts text into words."""
    if definition["normalizer"] is not None:
        raise NotCarriedOverError(f"it has a normalizer ({definition['normalizer']['type']})")
    steps = definition["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *splits, bytes_step = steps
    if bytes_step["type"] != "ByteLevel" or bytes_step["add_prefix_space"]:
        raise NotCarriedOverError("it is not byte-level BPE without a prefix space")
    if not splits and bytes_step["use_regex"]:
        return f"(?:{GPT2_PATTERN})"
    if len(splits) != 1 or bytes_step["use_regex"] or splits[0]["type"] != "Split":
        raise NotCarriedOverError("it cuts text into words in several steps")
    [split] = splits
    if split["behavior"] != "Isolated" or split["invert"]:
        raise NotCarriedOverError(f"it cuts text into words in the way {split['behavior']!r}")
    kind, value = next(iter(split["pattern"].items()))
    pattern = value if kind == "Regex" else re.escape(value)
    if _DOUBTFUL.search(_CLASS.sub("", _CONTRACTIONS.sub("", _ESCAPE.sub("", pattern)).replace("[^", "["))):
        raise NotCarriedOverError("its regular expression has what the two libraries may read differently")
    return f"(?:{pattern})"


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """Rank of each token's bytes, and id of each rank. Condition 1 of the module."""
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise NotCarriedOverError("it is not plain BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotCarriedOverError("its tokens are marked for their place in a word")
    vocab: dict[str, int] = model["vocab"]
    value = BYTE_OF_CHARACTER
    names = sorted(value, key=value.__getitem__)
    if not all(name in vocab for name in names):
        raise NotCarriedOverError("its vocabulary lacks some of the 256 bytes")
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = [vocab[name] for name in names]
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        parts = [bytes(value[name] for name in part) for part in (left, right)]
        if parts[0] not in ranks or parts[1] not in ranks:
            raise NotCarriedOverError(f"its merges make {token!r} from what they have not made before")
        joined = parts[0] + parts[1]
        if ranks.setdefault(joined, len(ids)) == len(ids):
            ids.append(vocab[token])
        elif ranks[joined] != len(ids) - 1:
            raise NotCarriedOverError(f"its merges come back to {token!r}")
    if model.get("ignore_merges") and len(set(vocab.values()) - set(ids)):
        raise NotCarriedOverError("its vocabulary has tokens that no merge makes, and takes whole words from it")
    return ranks, ids


def _check_vocabulary(model: dict[str, Any], ids: list[int]) -> None:
    """Condition 2 of the module."""
    plain = {**model, "ignore_merges": False}
    empty = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    merges_alone = tokenizers.Tokenizer.from_str(json.dumps({**empty, "model": plain}))
    wanted = set(ids)
    tokens = [(name, id) for name, id in model["vocab"].items() if id in wanted]
    encoded = merges_alone.encode_batch_fast([name for name, _ in tokens], add_special_tokens=False)
    for (name, id), encoding in zip(tokens, encoded, strict=True):
        if encoding.ids != [id]:
            raise NotCarriedOverError(f"its merges do not make {name!r} from its own bytes")
