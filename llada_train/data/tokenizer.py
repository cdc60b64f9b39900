"""Text ↔ token ids, by Hugging Face's tokenizer.json and tokenizer_config.json, without importing transformers."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llada_train.config.errors import UserError

# LLaDA's names (its tokenizer_config.json), which hold where tokenizer_config.json names no other.
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
MASK_TOKEN = "<|mdm_mask|>"

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`): printable Latin-1 as it is, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class Tokenizer:
    """A tokenizer with a mask token and an end-of-text token, which no text can produce."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str, mask_token: str, fingerprint: str) -> None:
        """Prefer `Tokenizer.load`. Both tokens must be in `backend`, which is changed."""
        # Text that happens to contain "<|mdm_mask|>" is text. This holds for tokens that are marked special only.
        backend.add_special_tokens([eos_token, mask_token])
        backend.encode_special_tokens = True
        # tokenizer.json may carry settings of an earlier use; a corpus is neither cut nor padded.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.fingerprint = fingerprint
        """sha256 of tokenizer.json, in hexadecimal."""
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        """The largest id + 1: how many ids a model must read."""
        self.eos_id = vocab[eos_token]
        self.mask_id = vocab[mask_token]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a tokenizer folder.

        Raises:
            UserError: the folder or a file is missing or broken, or there is no mask or EOS token.
        """
        data = _read(folder, TOKENIZER_FILE)
        try:
            config: Any = json.loads(_read(folder, CONFIG_FILE))
        except ValueError as error:
            raise UserError(f"{folder / CONFIG_FILE}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{folder / CONFIG_FILE}: expected a JSON object")
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{folder / TOKENIZER_FILE}: not a tokenizer: {error}") from None
        eos_token = _special_token(backend, folder, config, "eos_token", EOS_TOKEN)
        mask_token = _special_token(backend, folder, config, "mask_token", MASK_TOKEN)
        return cls(backend, eos_token, mask_token, hashlib.sha256(data).hexdigest())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing added; the names of special tokens inside a text are encoded as text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of text that each id 0 … vocab_size − 1 stands for; of special tokens, their names'.

        Those of a sequence of ids are the text's, but for a space that some tokenizers put before the first word.
        """
        found = [b""] * self.vocab_size
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if token in added:
                found[i] = token.encode()
            elif byte_level:
                found[i] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            elif _BYTE_TOKEN.fullmatch(token):  # sentencepiece's byte fallback
                found[i] = bytes([int(token[3:5], 16)])
            else:
                found[i] = token.replace("▁", " ").encode()
        return found

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of `ids`; special tokens are left out, or spelled out with `keep_special`."""
        return self._backend.decode(ids, skip_special_tokens=not keep_special)


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer with LLaDA's special tokens, and save it in `folder`.

    The same texts give the same files. Little text gives fewer than `vocab_size` tokens. transformers' AutoTokenizer
    loads the folder.

    Raises:
        UserError: there is no text, or vocab_size does not hold the 256 bytes and the special tokens.
    """
    special_tokens = [BOS_TOKEN, EOS_TOKEN, MASK_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(f"vocabulary size {vocab_size}: the bytes and special tokens alone are {smallest} tokens")
    first = next(texts, None)
    if first is None:
        raise UserError("empty text: there is no document to train a tokenizer on")

    folder.mkdir(parents=True, exist_ok=True)  # before the work, where it cannot be made
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(chain([first], texts), trainer)

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "mask_token": MASK_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / TOKENIZER_FILE, backend.to_str(pretty=True))
    _write(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    return Tokenizer.load(folder)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{folder}: no tokenizer: {name}: {error.strerror}; "
            "give a folder that `llada-data train-tokenizer` or transformers' save_pretrained wrote"
        ) from None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _special_token(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], key: str, default: str) -> str:
    entry = config.get(key) or default
    token = entry["content"] if isinstance(entry, dict) and "content" in entry else entry
    if not isinstance(token, str):
        raise UserError(f"{folder / CONFIG_FILE}: {key}: expected the token's text, found {entry!r}")
    if backend.token_to_id(token) is None:
        raise UserError(
            f"{folder}: the tokenizer has no {key.replace('_', ' ')}: {token!r} is not in its vocabulary; add it with "
            f"transformers: t = AutoTokenizer.from_pretrained({str(folder)!r}); "
            f"t.add_special_tokens({{{key!r}: {default!r}}}); t.save_pretrained({str(folder)!r})"
        )
    return token
