"""sentencepiece models, trained here and by others."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_tools.train_tokenizer import SPECIAL_TOKENS, Kind, add_special_tokens, train_tokenizer
from llada_train.config.errors import UserError
from llada_train.data.tokenizer import EOS_TOKEN, MASK_TOKEN, Tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界! 🙂\r\n\ttab", "the cat sat on the mat, the cat sat"] * 3
SPECIAL_TEXT = f"a{MASK_TOKEN} {EOS_TOKEN}<unk><s></s> b"


@pytest.fixture(scope="module", params=[Kind.SENTENCEPIECE_BPE, Kind.SENTENCEPIECE_UNIGRAM])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS), 300, path, request.param)
    return path


@given(text=st.text(st.characters(exclude_characters="\0\u2581", exclude_categories=["Cs"])))
def test_round_trip(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.load(folder)
    [ids] = tokenizer.encode_batch([text + SPECIAL_TEXT])
    assert tokenizer.decode(ids) == text + SPECIAL_TEXT
    assert not {tokenizer.mask_id, tokenizer.eos_id} & set(ids)


def test_the_bytes_of_tokens_are_those_of_the_text(folder: Path) -> None:
    """What `llada-data trace --find` searches; pieces of bytes, of words and of spaces."""
    tokenizer = Tokenizer.load(folder)
    for text in (*TEXTS, "a  b", "\U0001f600", SPECIAL_TEXT):
        [ids] = tokenizer.encode_batch([text])
        found = b"".join(tokenizer.token_bytes[id] for id in ids)
        assert tokenizer.normalized(text).encode() in found
        assert tokenizer.decode(ids).encode() == found.removeprefix(b" ")
    assert tokenizer.token_bytes[tokenizer.eos_id] == tokenizer.token_bytes[tokenizer.mask_id] == b"\xff"


def test_special_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert all(model.is_control(model.piece_to_id(token)) for token in SPECIAL_TOKENS)
    [ids] = tokenizer.encode_batch(["the cat"])
    assert tokenizer.decode([*ids, tokenizer.mask_id, *ids, tokenizer.eos_id], keep_special=True) == (
        f"the cat{MASK_TOKEN}the cat{EOS_TOKEN}"
    )
    assert tokenizer.decode([tokenizer.mask_id, *ids]) == "the cat"
    again = train_tokenizer(iter(TEXTS), 300, tmp_path, _kind(folder))
    assert again.fingerprint == tokenizer.fingerprint


def test_a_model_of_others_is_given_a_mask_token(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "m.model"
    with pytest.raises(UserError, match=r"no mask token: '<\|mdm_mask\|>'.*add-mask-token .*m\.model --output"):
        Tokenizer.load(path)
    assert add_special_tokens(path, tmp_path / "new") == [MASK_TOKEN]
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.load(tmp_path / "new")
    assert (ours.eos_id, ours.mask_id) == (theirs.eos_id(), len(theirs))
    texts = ["the cat sat", SPECIAL_TEXT]
    assert ours.encode_batch(texts) == theirs.encode(texts)
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_training_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="263 tokens"):
        train_tokenizer(iter(TEXTS), 262, tmp_path / "t", Kind.SENTENCEPIECE_BPE)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a tokenizer"):
        Tokenizer.load(tmp_path)


def _kind(folder: Path) -> Kind:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    scores = {model.get_score(id) for id in range(model.get_piece_size())}
    return Kind.SENTENCEPIECE_BPE if all(score == int(score) for score in scores) else Kind.SENTENCEPIECE_UNIGRAM
