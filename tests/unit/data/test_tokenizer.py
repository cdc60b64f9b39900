import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import BOS_TOKEN, EOS_TOKEN, MASK_TOKEN, Tokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界! 🙂\r\n\ttab", "the cat sat on the mat, the cat sat"] * 3
SPECIAL_TEXT = f"a{MASK_TOKEN} {EOS_TOKEN} b {BOS_TOKEN}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS), 300, path)
    return path


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_round_trip(folder: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer.load(folder)
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(id < tokenizer.vocab_size for ids in encoded for id in ids)


def test_ids(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([tokenizer.mask_id, tokenizer.eos_id], keep_special=True) == MASK_TOKEN + EOS_TOKEN
    assert tokenizer.decode([tokenizer.mask_id, tokenizer.eos_id]) == ""
    assert tokenizer.fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_text_never_becomes_a_special_token(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    [ids] = tokenizer.encode_batch([SPECIAL_TEXT])
    assert not {tokenizer.mask_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == SPECIAL_TEXT


def test_text_never_becomes_a_token_that_was_not_marked_special(files: Path) -> None:
    added = json.loads((files / "tokenizer.json").read_text())["added_tokens"]
    edit(files / "tokenizer.json", added_tokens=[{**token, "special": False} for token in added])
    tokenizer = Tokenizer.load(files)
    [ids] = tokenizer.encode_batch([SPECIAL_TEXT])
    assert not {tokenizer.mask_id, tokenizer.eos_id} & set(ids)


def test_nothing_is_cut_padded_or_added(files: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, 0)]
    )
    backend.save(str(files / "tokenizer.json"))
    tokenizer = Tokenizer.load(files)
    texts = ["the cat sat on the mat", "x"]
    assert [tokenizer.decode(ids, keep_special=True) for ids in tokenizer.encode_batch(texts)] == texts


def test_transformers_reads_the_same(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert (ours.mask_id, ours.eos_id, ours.vocab_size) == (theirs.mask_token_id, theirs.eos_token_id, len(theirs))
    assert (theirs.bos_token, theirs.pad_token) == (BOS_TOKEN, EOS_TOKEN)
    assert theirs.decode(ours.encode_batch(TEXTS)[1]) == TEXTS[1]


def test_we_read_what_transformers_writes(folder: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).mask_id == Tokenizer.load(folder).mask_id


@pytest.mark.parametrize("entry", ["the", {"__type": "AddedToken", "content": "the"}])
def test_the_config_names_the_tokens(files: Path, entry: object) -> None:
    edit(files / "tokenizer_config.json", mask_token=entry)
    tokenizer = Tokenizer.load(files)
    assert tokenizer.decode([tokenizer.mask_id], keep_special=True) == "the"


def test_without_names_llada_s_hold(files: Path) -> None:
    (files / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(files)
    assert tokenizer.decode([tokenizer.mask_id], keep_special=True) == MASK_TOKEN


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 300, tmp_path)
    assert again.fingerprint == Tokenizer.load(folder).fingerprint


@pytest.mark.parametrize(("texts", "vocab_size", "message"), [([], 300, "empty text"), (TEXTS, 258, "259 tokens")])
def test_training_refuses(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(iter(texts), vocab_size, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("key", "name"), [("mask_token", "mask token"), ("eos_token", "eos token")])
def test_a_missing_token_and_how_to_add_it(files: Path, key: str, name: str) -> None:
    edit(files / "tokenizer_config.json", **{key: "<none>"})
    with pytest.raises(UserError, match=f"no {name}: '<none>' .* add it with transformers") as error:
        Tokenizer.load(files)
    code = str(error.value).split("add it with transformers: ")[1]
    exec(code, {"AutoTokenizer": AutoTokenizer})  # the advice works
    Tokenizer.load(files)


def test_faulty_files(files: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer: tokenizer\.json"):
        Tokenizer.load(files / "nowhere")
    edit(files / "tokenizer_config.json", mask_token=5)
    with pytest.raises(UserError, match="mask_token: expected the token's text, found 5"):
        Tokenizer.load(files)
    (files / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        Tokenizer.load(files)
    (files / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(files)
    (files / "tokenizer.json").write_text("{}")
    (files / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(files)
    (files / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer: tokenizer_config\.json"):
        Tokenizer.load(files)
