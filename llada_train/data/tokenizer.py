"""Text ↔ token ids, by tokenizer.json or a sentencepiece model, and tokenizer_config.json; without transformers."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from llada_train.config.errors import UserError
from llada_train.data.tokenizer_backends import Backend, HuggingFaceBackend, SentencePieceBackend

# LLaDA's names (its tokenizer_config.json), which hold where tokenizer_config.json names no other.
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
MASK_TOKEN = "<|mdm_mask|>"
CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """A tokenizer with a mask token and an end-of-text token, which no text can produce."""

    def __init__(self, backend: Backend, eos_token: str, mask_token: str, bos_token: str, fingerprint: str) -> None:
        """Prefer `Tokenizer.load`. The EOS and the mask token must be in the vocabulary."""
        self._backend = backend
        self.bos_token, self.eos_token = bos_token, eos_token
        self.fingerprint = fingerprint
        """sha256 of tokenizer.json or the sentencepiece model, in hexadecimal."""
        vocab = backend.vocab
        self.vocab_size = max(vocab.values()) + 1
        """The largest id + 1: how many ids a model must read."""
        self.eos_id = vocab[eos_token]
        self.mask_id = vocab[mask_token]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a tokenizer folder, or a sentencepiece model.

        Raises:
            UserError: the folder or a file is missing or broken, there is no mask or EOS token, or text can produce it.
        """
        files = TokenizerFiles.read(path)
        eos_token, mask_token = files.special_token("eos_token"), files.special_token("mask_token")
        backend: Backend
        if files.tokenizers is not None:
            backend = HuggingFaceBackend(files.tokenizers, [eos_token, mask_token])
        else:
            assert files.sentencepiece is not None
            backend = files.sentencepiece
        vocab = backend.vocab
        for key, token in (("eos_token", eos_token), ("mask_token", mask_token)):
            # As unigram and word-level models do, and BPE that takes whole words from its vocabulary.
            if any(vocab[token] in ids for ids in backend.encode_batch([token, f"a{token}a", f"a {token} a"])):
                raise UserError(
                    f"{path}: text can produce the {key.replace('_', ' ')}, {token!r}; let {path / CONFIG_FILE} name "
                    f"one that is new as its {key}, and add it by `llada-data add-mask-token {path} --output FOLDER`"
                )
        bos_token = files.name_of("bos_token")
        return cls(backend, eos_token, mask_token, bos_token, hashlib.sha256(files.data).hexdigest())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Those that no text can produce → id."""
        return self._backend.special_tokens

    @property
    def definition(self) -> dict[str, Any] | None:
        """What tokenizer.json says, parsed; None for a sentencepiece model."""
        return self._backend.definition

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of text that each id 0 … vocab_size − 1 stands for; of special tokens a byte that is in no text.

        Those of a sequence of ids are the normalised text's, but for a space that some put before the first word.

        Raises:
            UserError: the text does not follow from its tokens one by one.
        """
        if not self._backend.decodes_by_token:
            raise UserError(
                "this tokenizer's decoder joins tokens by rules of its own: what a token stands for is unknown"
            )
        found = [b""] * self.vocab_size
        for token, id in self._backend.vocab.items():
            found[id] = self._backend.bytes_of(token)
        return found

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None: there is none of this name."""
        return self._backend.vocab.get(token)

    def normalized(self, text: str) -> str:
        """The text that the tokens of `text` stand for."""
        return self._backend.normalized(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing added; the names of special tokens inside a text are encoded as text."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of `ids`; special tokens are left out, or spelled out with `keep_special`."""
        return self._backend.decode(ids, keep_special)


class TokenizerFiles:
    """What lies in a tokenizer folder, whether or not it has the special tokens."""

    def __init__(self, path: Path, data: bytes, config: dict[str, Any], is_sentencepiece: bool) -> None:
        """
        Raises:
            UserError: `data` is no tokenizer.
        """
        self.path = path
        self.data = data
        self.config = config
        self.tokenizers: tokenizers.Tokenizer | None = None
        self.sentencepiece: SentencePieceBackend | None = None
        try:
            if is_sentencepiece:
                self.sentencepiece = SentencePieceBackend(data)
            else:
                self.tokenizers = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the libraries raise nothing narrower
            name = SENTENCEPIECE_FILE if is_sentencepiece else TOKENIZER_FILE
            raise UserError(f"{path if path.is_file() else path / name}: not a tokenizer: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a folder, or a sentencepiece model.

        Raises:
            UserError: a file is missing or broken.
        """
        if path.is_file():
            if path.name == TOKENIZER_FILE:
                raise UserError(f"{path}: give the folder that it lies in, {path.parent}")
            return cls(path, _read(path.parent, path.name), {}, is_sentencepiece=True)
        is_sentencepiece = not (path / TOKENIZER_FILE).exists() and (path / SENTENCEPIECE_FILE).exists()
        data = _read(path, SENTENCEPIECE_FILE if is_sentencepiece else TOKENIZER_FILE)
        try:
            config: Any = json.loads(_read(path, CONFIG_FILE))
        except ValueError as error:
            raise UserError(f"{path / CONFIG_FILE}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{path / CONFIG_FILE}: expected a JSON object")
        return cls(path, data, config, is_sentencepiece)

    def has(self, token: str) -> bool:
        """Whether it is in the vocabulary, and can be told from text."""
        if self.tokenizers is not None:
            return self.tokenizers.token_to_id(token) is not None
        assert self.sentencepiece is not None
        return token in self.sentencepiece.vocab and self.sentencepiece.is_special(token)

    def name_of(self, key: str) -> str:
        """The token that is the `bos_token`, `eos_token` or `mask_token`, whether or not the tokenizer has it.

        Raises:
            UserError: the config names something else than a token.
        """
        own = self.sentencepiece.eos_token if self.sentencepiece else None
        default = {"mask_token": MASK_TOKEN, "bos_token": BOS_TOKEN}.get(key) or own or EOS_TOKEN
        entry = self.config.get(key) or default
        token = entry["content"] if isinstance(entry, dict) and "content" in entry else entry
        if not isinstance(token, str):
            raise UserError(f"{self.path / CONFIG_FILE}: {key}: expected the token's text, found {entry!r}")
        return token

    def special_token(self, key: str) -> str:
        """`name_of` a token that is there.

        Raises:
            UserError: as `name_of`, or the tokenizer does not have it.
        """
        token = self.name_of(key)
        if not self.has(token):
            raise UserError(
                f"{self.path}: the tokenizer has no {key.replace('_', ' ')}: {token!r} is not in its vocabulary, or is "
                f"one that text can produce; `llada-data add-mask-token {self.path} --output FOLDER` makes one that has"
            )
        return token


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{folder}: no tokenizer: {name}: {error.strerror}; give a folder that `llada-data train-tokenizer` or "
            "transformers' save_pretrained wrote, or a sentencepiece model"
        ) from None
