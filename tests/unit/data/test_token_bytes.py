"""What each token stands for, by tokenizers of several makes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import EOS_TOKEN, MASK_TOKEN, Tokenizer

TEXTS = ["the cat sat on the mat", "Grüße, 世界! 🙂\n\ttab", "def f(x):\n    return x  +  1"]
Make = Callable[[], tuple[Library, trainers.Trainer]]


def byte_level() -> tuple[Library, trainers.Trainer]:
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return library, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def normalizing() -> tuple[Library, trainers.Trainer]:
    library, trainer = byte_level()
    library.normalizer = normalizers.NFC()
    return library, trainer


def metaspace() -> tuple[Library, trainers.Trainer]:
    library = Library(models.BPE(byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return library, trainers.BpeTrainer(vocab_size=400, special_tokens=[f"<0x{byte:02X}>" for byte in range(256)])


def word_piece() -> tuple[Library, trainers.Trainer]:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return library, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"])


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Make], Tokenizer]:
    def load(make: Make) -> Tokenizer:
        library, trainer = make()
        library.train_from_iterator(TEXTS, trainer)
        library.add_special_tokens([EOS_TOKEN, MASK_TOKEN])
        library.add_tokens(["我", "<think>"])  # ordinary text, of one token each
        library.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
        return Tokenizer.load(tmp_path)

    return load


@pytest.mark.parametrize("make", [byte_level, normalizing])
def test_tokens_one_after_another_are_the_text(load: Callable[[Make], Tokenizer], make: Make) -> None:
    tokenizer = load(make)
    for text in [*TEXTS, "我 <think> cafe\u0301", f"a{EOS_TOKEN}b"]:
        [ids] = tokenizer.encode_batch([text])
        assert b"".join(tokenizer.token_bytes[id] for id in ids).decode() == tokenizer.normalized(text)
    assert tokenizer.token_bytes[tokenizer.eos_id] == b"\xff"


def test_a_normaliser_is_asked(load: Callable[[Make], Tokenizer]) -> None:
    assert load(normalizing).normalized("cafe\u0301") == "caf\u00e9"
    assert load(byte_level).normalized("cafe\u0301") == "cafe\u0301"


def test_words_that_begin_with_a_mark(load: Callable[[Make], Tokenizer]) -> None:
    tokenizer = load(metaspace)
    [ids] = tokenizer.encode_batch(["the cat sat on the mat"])
    assert b"".join(tokenizer.token_bytes[id] for id in ids) == b" the cat sat on the mat"


def test_a_decoder_with_rules_of_its_own_is_refused(load: Callable[[Make], Tokenizer]) -> None:
    with pytest.raises(UserError, match="what a token stands for is unknown"):
        _ = load(word_piece).token_bytes
