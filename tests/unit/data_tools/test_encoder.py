"""tiktoken, where it is used, gives the ids of the tokenizer's own library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from data_tools.encoder import GPT2_PATTERN, FastEncoder, NotCarriedOverError, SlowEncoder, choose, make_encoder
from data_tools.train_tokenizer import Kind, train_tokenizer
from llada_train.data.tokenizer import Tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS_ONLY = r"\p{L}+"  # leaves out most characters
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
TEXTS = [*SOURCES, "Grüße, 世界! 🙂 I'LL we'd ſ'ſ K 3rd 1234567", "a  b\n\n\n  c \r\n\t d", "ﬀ ß İ ǅ ҈ ⅷ"]
Change = Callable[[dict[str, Any]], None]


def changed(folder: Path, new: Path, change: Change) -> Tokenizer:
    """A tokenizer with another definition."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    change(definition)
    (new / "tokenizer.json").write_text(json.dumps(definition))
    (new / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return Tokenizer.load(new)


def splitting(pattern: str) -> Change:
    def change(definition: dict[str, Any]) -> None:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        definition["pre_tokenizer"] = json.loads(backend.to_str())["pre_tokenizer"]

    return change


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS), 1500, path)
    return path


@pytest.fixture(scope="module")
def carried_over(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    def new(name: str, change: Change) -> Tokenizer:
        return changed(folder, tmp_path_factory.mktemp(name), change)

    def takes_words(definition: dict[str, Any]) -> None:
        definition["model"]["ignore_merges"] = True
        for token in definition["added_tokens"]:
            del definition["model"]["vocab"][token["content"]]

    patterns = {"cl100k": CL100K, "o200k": O200K, "letters_only": LETTERS_ONLY}
    return {
        "gpt2": Tokenizer.load(folder),
        **{name: new(name, splitting(pattern)) for name, pattern in patterns.items()},
        "ignore_merges": new("words", takes_words),
    }


@pytest.fixture(scope="module")
def encoders(carried_over: dict[str, Tokenizer]) -> dict[str, FastEncoder]:
    return {name: FastEncoder(tokenizer) for name, tokenizer in carried_over.items()}


NAMES = ["gpt2", "cl100k", "o200k", "letters_only", "ignore_merges"]
PIECES = st.sampled_from(
    ["'", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "the", "def", "self.", "0", "123", "_", "é", "ſ", "\u3000"]
)
TEXT = st.one_of(st.text(), st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join))


@pytest.mark.parametrize("name", NAMES)
def test_real_text_gives_the_same_ids(carried_over: dict[str, Tokenizer], name: str) -> None:
    tokenizer = carried_over[name]
    assert choose(tokenizer, TEXTS) is None
    for threads in (1, 2):
        fast = FastEncoder(tokenizer, threads=threads)
        for ids, theirs in zip(fast.encode(TEXTS), tokenizer.encode_batch(TEXTS), strict=True):
            assert ids.tolist() == theirs


@settings(max_examples=400)
@given(text=TEXT, name=st.sampled_from(NAMES))
def test_any_text_gives_the_same_ids(
    carried_over: dict[str, Tokenizer], encoders: dict[str, FastEncoder], text: str, name: str
) -> None:
    tokenizer = carried_over[name]
    assert [ids.tolist() for ids in encoders[name].encode([text])] == tokenizer.encode_batch([text])


@pytest.mark.parametrize(
    "name",
    [rf"\p{{{name}}}" for name in ("L", "N", "M", "P", "S", "Z", "Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Han")]
    + [r"\s", r"\d"],
)
def test_both_libraries_know_the_same_characters(name: str) -> None:
    """All of Unicode's planes that have characters, or may get some."""
    planes = range(0x40000) if name in (r"\p{L}", r"\p{N}", r"\s", r"\p{Han}") else range(0x20000)
    characters = "".join(chr(code) for code in planes if not 0xD800 <= code < 0xE000)
    rest = normalizers.Replace(tokenizers.Regex(name), "").normalize_str(characters)
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("class", pat_str=name, mergeable_ranks=ranks, special_tokens={})
    found = encoding.encode_to_numpy(characters, disallowed_special=()).astype(np.uint8).tobytes().decode()
    assert set(found) == set(characters) - set(rest)
    assert found


def test_what_the_regular_expression_gives_up_on(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    texts = ["a" + " " * 1_000_001 + "b", "next"]
    encoding = tiktoken.Encoding(
        "x", pat_str=GPT2_PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    with pytest.raises(ValueError, match="stack size"):
        encoding.encode_to_numpy(texts[0])
    assert [ids.tolist() for ids in FastEncoder(tokenizer).encode(texts)] == tokenizer.encode_batch(texts)


def test_tokens_that_are_found_in_text(folder: Path, tmp_path: Path) -> None:
    def change(definition: dict[str, Any]) -> None:
        token = {**definition["added_tokens"][0], "id": 1500, "content": "<tool>", "special": False}
        definition["added_tokens"].append(token)

    tokenizer = changed(folder, tmp_path, change)
    texts = ["call <tool> now", "call <|mdm_mask|> now"]
    ids = [ids.tolist() for ids in FastEncoder(tokenizer).encode(texts)]
    assert ids == tokenizer.encode_batch(texts)
    assert 1500 in ids[0]
    assert tokenizer.mask_id not in ids[1]


def unreachable(definition: dict[str, Any]) -> None:
    """ "bcd" is joined from the left only after its end has been joined: never; tiktoken joins it."""
    merges = [["c", "d"], ["b", "c"], ["bc", "d"]]
    vocab = {name: id for name, id in definition["model"]["vocab"].items() if len(name) == 1 or name[0] == "<"}
    vocab |= {"".join(merge): 1000 + i for i, merge in enumerate(merges)}
    definition["model"] |= {"merges": merges, "vocab": vocab}


def comes_back(definition: dict[str, Any]) -> None:
    merges = [["b", "c"], ["bc", "d"], ["c", "d"], ["b", "cd"]]
    vocab = {name: id for name, id in definition["model"]["vocab"].items() if len(name) == 1 or name[0] == "<"}
    vocab |= {"bc": 1000, "bcd": 1001, "cd": 1002}
    definition["model"] |= {"merges": merges, "vocab": vocab}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), r"normalizer \(NFC\)"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "prefix space"),
        (lambda d: d.update(pre_tokenizer=None), "not byte-level"),
        (lambda d: d["model"].update(byte_fallback=True), "not plain BPE"),
        (lambda d: d["model"].update(merges=d["model"]["merges"][1:]), "not made before|from its own bytes"),
        (lambda d: d["model"].update(merges=d["model"]["merges"][:-1], ignore_merges=True), "no merge makes"),
        (unreachable, "do not make 'bcd' from its own bytes"),
        (comes_back, "its merges come back to 'bcd'"),
        (splitting(r"\b\w+"), "regular expression"),
        (splitting(r"[a-z&&[^x]]+|."), "regular expression"),
        (splitting(r"\p{N}{1,3}+|\D+"), "regular expression"),  # possessive, or repeated
        (splitting(r"[!--a]+|."), "regular expression"),  # a difference of classes, or characters
        (splitting(r"(?i:\p{Lu}+)|."), "regular expression"),
        (splitting(r"\<a\>|."), "regular expression"),  # ends of words, or characters
    ],
)
def test_what_cannot_be_carried_over(folder: Path, tmp_path: Path, change: Change, why: str) -> None:
    tokenizer = changed(folder, tmp_path, change)
    with pytest.raises(NotCarriedOverError, match=why):
        FastEncoder(tokenizer)
    assert choose(tokenizer, TEXTS) is not None
    encoder = make_encoder(tokenizer, fast=False, all_cores=False)
    assert isinstance(encoder, SlowEncoder)
    assert [ids.tolist() for ids in encoder.encode(["abcd x"])] == tokenizer.encode_batch(["abcd x"])


def test_the_condition_on_the_vocabulary_is_needed(folder: Path, tmp_path: Path) -> None:
    tokenizer = changed(folder, tmp_path, unreachable)
    fast = FastEncoder(tokenizer, check=False)
    assert [ids.tolist() for ids in fast.encode(["bcd"])] != tokenizer.encode_batch(["bcd"])


def test_a_difference_on_the_sample_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.encoder.GPT2_PATTERN", r"\S+|\s+")
    why = choose(Tokenizer.load(folder), TEXTS)
    assert why is not None
    assert "differ on a sample" in why


def test_chance_is_turned_off(folder: Path, tmp_path: Path) -> None:
    tokenizer = changed(folder, tmp_path, lambda definition: definition["model"].update(dropout=0.5))
    assert tokenizer.encode_batch(TEXTS) == Tokenizer.load(folder).encode_batch(TEXTS)
    assert choose(tokenizer, TEXTS) is None


def test_sentencepiece_is_not_carried_over(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 400, tmp_path, Kind.SENTENCEPIECE_BPE)
    assert choose(tokenizer, TEXTS) == "it is a sentencepiece model"
