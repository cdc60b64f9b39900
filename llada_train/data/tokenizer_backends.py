"""The libraries that tokenizers are of, behind one interface: Hugging Face's `tokenizers`, and sentencepiece."""

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import tokenizers

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`): printable Latin-1 as it is, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


NO_TEXT = b"\xff"  # in no UTF-8
# Of tokenizer.json, those that a text's bytes do not hang on, or only those of the first word.
_PLAIN_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}


class Backend(Protocol):
    """A tokenizer whose special tokens no text can produce."""

    @property
    def vocab(self) -> dict[str, int]:
        """Token → id; made anew each time, since it may be large and is needed seldom."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Those that no text can produce → id."""
        ...

    @property
    def definition(self) -> dict[str, Any] | None:
        """What tokenizer.json says, parsed; None for a sentencepiece model."""
        ...

    @property
    def decodes_by_token(self) -> bool:
        """Whether a text is what its tokens stand for, one after another."""
        ...

    def bytes_of(self, token: str) -> bytes:
        """The bytes of text that a token of the vocabulary stands for; of a special one NO_TEXT."""
        ...

    def normalized(self, text: str) -> str:
        """What the tokens of a text stand for."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing added."""
        ...

    def decode(self, ids: Sequence[int], keep_special: bool) -> str:
        """Special tokens are left out, or spelled out."""
        ...


class HuggingFaceBackend:
    """A tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: list[str]) -> None:
        """`special_tokens` must be in `backend`, which is changed."""
        # Text that happens to contain "<|mdm_mask|>" is text. This holds for tokens that are marked special only.
        backend.add_special_tokens(special_tokens)
        backend.encode_special_tokens = True
        # tokenizer.json may carry settings of an earlier use; a corpus is neither cut nor padded, nor left to chance.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, tokenizers.models.BPE):
            backend.model.dropout = None
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._added = {token.content for token in added}

    @property
    def vocab(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, int]:
        vocab = self.vocab
        return {token: vocab[token] for token in self._special}

    @property
    def definition(self) -> dict[str, Any]:
        definition: dict[str, Any] = json.loads(self._backend.to_str())
        return definition

    @cached_property
    def _decoders(self) -> set[str]:
        decoder = self.definition["decoder"] or {}
        return {one["type"] for one in (decoder, *decoder.get("decoders", ())) if one}

    @property
    def decodes_by_token(self) -> bool:
        return bool(self._decoders) and self._decoders <= _PLAIN_DECODERS

    def bytes_of(self, token: str) -> bytes:
        if token in self._special:
            return NO_TEXT
        if "ByteLevel" not in self._decoders:
            return token.encode() if token in self._added else _bytes_of_piece(token)
        if token in self._added or not all(character in BYTE_OF_CHARACTER for character in token):
            return token.encode()
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    def normalized(self, text: str) -> str:
        normalizer = self._backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text).replace("▁", " ").strip(" ")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], keep_special: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=not keep_special)


class SentencePieceBackend:
    """A sentencepiece model. Its control symbols are the special tokens."""

    definition: dict[str, Any] | None = None

    def __init__(self, model: bytes) -> None:
        """
        Raises:
            ValueError: it is none.
        """
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        self.vocab = {self._model.id_to_piece(id): id for id in range(self._model.get_piece_size())}

    decodes_by_token = True

    @property
    def special_tokens(self) -> dict[str, int]:
        return {token: id for token, id in self.vocab.items() if self.is_special(token)}

    def bytes_of(self, token: str) -> bytes:
        return NO_TEXT if self.is_special(token) else _bytes_of_piece(token)

    def normalized(self, text: str) -> str:
        normalized: str = self._model.normalize(text)
        return normalized.replace("▁", " ").strip(" ")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One switch for both libraries.
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: Sequence[int], keep_special: bool) -> str:
        parts = []
        for special, run in groupby(ids, self._model.is_control):
            if not special:
                parts.append(self._model.decode(list(run)))
            elif keep_special:
                parts.extend(map(self._model.id_to_piece, run))
        return "".join(parts)

    def is_special(self, token: str) -> bool:
        """Whether no text can produce this token of the vocabulary."""
        return bool(self._model.is_control(self.vocab[token]))

    @property
    def eos_token(self) -> str | None:
        """The model's own."""
        return self._model.id_to_piece(self._model.eos_id()) if self._model.eos_id() >= 0 else None


def _bytes_of_piece(piece: str) -> bytes:
    """By sentencepiece's conventions, which `tokenizers` follows."""
    return bytes([int(piece[3:5], 16)]) if _BYTE_TOKEN.fullmatch(piece) else piece.replace("▁", " ").encode()
