import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_tools.train_tokenizer import Kind, add_special_tokens, train_tokenizer
from llada_train.config.errors import UserError
from llada_train.data.corpus_writer import token_dtype
from llada_train.data.tokenizer import BOS_TOKEN, EOS_TOKEN, MASK_TOKEN, Tokenizer

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


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["<mask>", 0.0], ["a", -1.0]]}
WORDS = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "</s>": 1, "<mask>": 2, "a": 3}}
WHOLE_WORDS = {"type": "BPE", "ignore_merges": True, "merges": [], "vocab": {"a": 0, "</s>": 1, "<mask>": 2}}


@pytest.mark.parametrize("model", [UNIGRAM, WORDS, WHOLE_WORDS])
def test_a_tokenizer_that_makes_special_tokens_of_text_is_refused(tmp_path: Path, model: dict[str, object]) -> None:
    backend = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    backend |= {"model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "</s>", "mask_token": "<mask>"}))
    with pytest.raises(UserError, match=r"text can produce the eos token, '</s>'; let .* name one that is new"):
        Tokenizer.load(tmp_path)
    config.write_text(json.dumps({"eos_token": "<eos>", "mask_token": "<new>"}))  # as the message says
    assert add_special_tokens(tmp_path, tmp_path / "new") == ["<eos>", "<new>"]
    tokenizer = Tokenizer.load(tmp_path / "new")
    [ids] = tokenizer.encode_batch(["a <eos> <new> a"])
    assert not {tokenizer.eos_id, tokenizer.mask_id} & set(ids)


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


@pytest.mark.parametrize("entry", ["<|eot_id|>", {"__type": "AddedToken", "content": "<|eot_id|>"}])
def test_the_config_names_the_tokens(files: Path, entry: object) -> None:
    edit(files / "tokenizer_config.json", mask_token=entry)
    tokenizer = Tokenizer.load(files)
    assert tokenizer.decode([tokenizer.mask_id], keep_special=True) == "<|eot_id|>"


def test_without_names_llada_s_hold(files: Path) -> None:
    (files / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(files)
    assert tokenizer.decode([tokenizer.mask_id], keep_special=True) == MASK_TOKEN


def test_lladas_own_layout(tmp_path: Path) -> None:
    """126,080 ids of text and bytes, then special ones with gaps between; tokenizer_config.json names no mask."""
    special = {"<|startoftext|>": 126080, "<|endoftext|>": 126081, "[CLS]": 126082, "[gMASK]": 126083}
    special |= {f"<|reserved_token_{i}|>": 126084 + i for i in range(252)}
    special |= {"<|mdm_mask|>": 126336, **{f"<|reserved_token_{i}|>": 126085 + i for i in range(252, 255)}}
    special |= {"<role>": 126340, "</role>": 126341, "<|arithmetic_start|>": 126342, "<|arithmetic_end|>": 126343}
    special |= {"<|number_start|>": 126344, "<|number_end|>": 126345, "<|start_header_id|>": 126346}
    special |= {"<|end_header_id|>": 126347, "<|eot_id|>": 126348}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: id for id, name in enumerate([*alphabet, *(f"filler {i}" for i in range(126080 - 256))])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(special))
    assert {name: backend.token_to_id(name) for name in special} == special
    backend.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**names, "cls_token": "[CLS]", "gmask_token": "[gMASK]"})
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size) == (126336, 126081, 126349)
    assert token_dtype(tokenizer.vocab_size) == "int32"
    assert add_special_tokens(tmp_path, tmp_path / "new") == []
    assert Tokenizer.load(tmp_path / "new").fingerprint == tokenizer.fingerprint
    assert tokenizer.encode_batch(["<|eot_id|>"])[0] == [vocab[character] for character in "<|eot_id|>"]


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 300, tmp_path)
    assert again.fingerprint == Tokenizer.load(folder).fingerprint


@pytest.mark.parametrize(("texts", "vocab_size", "message"), [([], 300, "empty text"), (TEXTS, 261, "262 tokens")])
def test_training_refuses(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(iter(texts), vocab_size, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("key", "name"), [("mask_token", "mask token"), ("eos_token", "eos token")])
def test_a_missing_token_and_how_to_add_it(folder: Path, files: Path, tmp_path: Path, key: str, name: str) -> None:
    edit(files / "tokenizer_config.json", **{key: "<none>"})
    with pytest.raises(UserError, match=f"no {name}: '<none>' .*`llada-data add-mask-token {files} "):
        Tokenizer.load(files)
    assert add_special_tokens(files, tmp_path / "new") == ["<none>"]
    before, after = Tokenizer.load(folder), Tokenizer.load(tmp_path / "new")
    assert after.encode_batch(TEXTS) == before.encode_batch(TEXTS)
    assert after.vocab_size == before.vocab_size + 1
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (theirs.mask_token_id, theirs.eos_token_id) == (after.mask_id, after.eos_id)


def test_only_the_tokenizer_of_a_model_is_copied(files: Path, tmp_path: Path) -> None:
    edit(files / "tokenizer_config.json", mask_token="<none>")
    (files / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<|eot_id|>"}))
    (files / "added_tokens.json").write_text(json.dumps({"<other>": 300}))
    for name in ("chat_template.jinja", "tokenization_mine.py", "model.safetensors", "config.json"):
        (files / name).write_text("{}")
    new = tmp_path / "new"
    add_special_tokens(files, new)
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenization_mine.py"}
    assert {path.name for path in new.iterdir()} == kept
    assert AutoTokenizer.from_pretrained(new).mask_token_id == Tokenizer.load(new).mask_id
    before = {path.name for path in files.iterdir()}
    add_special_tokens(files, files)  # the model's own folder
    assert {path.name for path in files.iterdir()} == before - {"special_tokens_map.json", "added_tokens.json"}
    assert AutoTokenizer.from_pretrained(files).mask_token_id == Tokenizer.load(files).mask_id


def test_a_tokenizer_is_replaced_whole_or_not_at_all(
    files: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in files.iterdir()}

    def no_space(path: Path, data: bytes) -> int:
        if path.name.startswith("tokenizer_config"):
            raise OSError("no space left")
        return write_bytes(path, data)

    before, write_bytes = content(), Path.write_bytes
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path, "write_bytes", no_space)
        train_tokenizer(iter(TEXTS), 300, files, Kind.SENTENCEPIECE_BPE)
    assert content() == before
    train_tokenizer(iter(TEXTS), 300, files, Kind.SENTENCEPIECE_BPE)
    assert content().keys() == {"tokenizer.model", "tokenizer_config.json"}


def test_faulty_files(files: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: give the folder that it lies in"):
        Tokenizer.load(files / "tokenizer.json")
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
