"""Tokenizers made from text, and special tokens for those that lack them."""

import io
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import (
    BOS_TOKEN,
    CHAT_TOKENS,
    CONFIG_FILE,
    EOS_TOKEN,
    MASK_TOKEN,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerFiles,
)

SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, MASK_TOKEN, *CHAT_TOKENS)
# Of a tokenizer of others, beside its vocabulary and config; what else its folder has may be a model's weights.
KEPT = ("chat_template*", "additional_chat_templates/*.jinja", "tokenization_*.py")
# What would say something else than the vocabulary and the config that are written.
REPEATED = ("special_tokens_map.json", "added_tokens.json")
# Of a line that sentencepiece trains on, in bytes, and of how many lines, drawn at random, so that memory is bounded.
SENTENCE_BYTES, SENTENCES = 4000, 10_000_000


class Kind(StrEnum):
    BYTE_LEVEL_BPE = "byte-level-bpe"
    SENTENCEPIECE_BPE = "sentencepiece-bpe"
    SENTENCEPIECE_UNIGRAM = "sentencepiece-unigram"


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path, kind: Kind = Kind.BYTE_LEVEL_BPE) -> Tokenizer:
    """Train a tokenizer with LLaDA's special tokens, for chat, too, and save it in `folder`.

    The same texts give the same files. Little text gives fewer than `vocab_size` tokens. transformers' AutoTokenizer
    loads byte-level BPE. All kinds keep text as it is, but for sentencepiece U+2581 is a space.

    Raises:
        UserError: there is no text, or vocab_size does not hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS) + (kind is not Kind.BYTE_LEVEL_BPE)  # sentencepiece has one for the unknown
    if vocab_size < smallest:
        raise UserError(f"vocabulary size {vocab_size}: the bytes and special tokens alone are {smallest} tokens")
    first = next(texts, None)
    if first is None:
        raise UserError("empty text: there is no document to train a tokenizer on")
    folder.mkdir(parents=True, exist_ok=True)  # before the work, where it cannot be made
    texts = chain([first], texts)
    config: dict[str, Any] = {
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "mask_token": MASK_TOKEN,
    }
    if kind is Kind.BYTE_LEVEL_BPE:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        name, data = TOKENIZER_FILE, _byte_level_bpe(texts, vocab_size)
    else:
        name, data = SENTENCEPIECE_FILE, _sentencepiece(texts, vocab_size, kind)
    _save(folder, {name: data, CONFIG_FILE: _config_data(config)})
    return Tokenizer.load(folder)


def add_special_tokens(path: Path, folder: Path) -> list[str]:
    """Write the tokenizer at `path` to `folder`, with a mask and an EOS token if it lacks them; which those are.

    No id changes.

    Raises:
        UserError: the tokenizer is broken.
    """
    files = TokenizerFiles.read(path)
    names = {key: files.name_of(key) for key in ("eos_token", "mask_token")}
    added = [token for token in names.values() if not files.has(token)]
    name = SENTENCEPIECE_FILE if files.tokenizers is None else TOKENIZER_FILE
    if files.tokenizers is None:
        data = _with_control_symbols(files.data, added)
    elif added:
        files.tokenizers.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        data = files.tokenizers.to_str(pretty=True).encode()
    else:
        data = files.data
    written = {name: data, CONFIG_FILE: _config_data(files.config | names)}
    if path.is_dir():
        written |= {str(file.relative_to(path)): file.read_bytes() for kept in KEPT for file in path.glob(kept)}
    _save(folder, written)
    Tokenizer.load(folder)
    return added


def _byte_level_bpe(texts: Iterator[str], vocab_size: int) -> bytes:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str(pretty=True).encode()


def _sentencepiece(texts: Iterator[str], vocab_size: int, kind: Kind) -> bytes:
    """Every character that is not in the vocabulary is its bytes, and spaces are kept, so that no text is changed."""
    import sentencepiece

    lines = (
        line[start : start + SENTENCE_BYTES // 4]  # a character has at most 4 bytes
        for text in texts
        for line in text.splitlines()
        for start in range(0, len(line), SENTENCE_BYTES // 4)
    )
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind.removeprefix("sentencepiece-"),
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            bos_piece=BOS_TOKEN,
            eos_piece=EOS_TOKEN,
            control_symbols=[MASK_TOKEN, *CHAT_TOKENS],
            max_sentence_length=SENTENCE_BYTES,
            input_sentence_size=SENTENCES,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"sentencepiece cannot train on this text: {error}") from None
    return model.getvalue()


def _with_control_symbols(model: bytes, tokens: list[str]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    known = {piece.piece: piece for piece in proto.pieces}
    for token in tokens:
        if token in known:  # as text; two pieces of one name are not allowed
            known[token].type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
        else:
            proto.pieces.add(piece=token, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL)
    data: bytes = proto.SerializeToString()
    return data


def _config_data(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _save(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the tokenizer in `folder`. Until all files are written, the old one is all there."""
    partial = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, data in files.items():
            partial[name].parent.mkdir(parents=True, exist_ok=True)
            partial[name].write_bytes(data)
        for name in files:
            partial[name].replace(folder / name)
    except BaseException:
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise
    for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE, *REPEATED):
        if name not in files:
            (folder / name).unlink(missing_ok=True)
