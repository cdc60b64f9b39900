"""A folder that appears whole or not at all."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llada_train.checkpoint.store import sync
from llada_train.config.errors import UserError
from llada_train.data.tokenizer import CONFIG_FILE, SENTENCEPIECE_FILE, TOKENIZER_FILE, TokenizerFiles

_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    SENTENCEPIECE_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "chat_template.jinja",
)


def output_problems(out: Path, size: int) -> list[str]:
    """Why no folder of so many bytes can be made there."""
    if out.exists() or out.is_symlink():
        return [f"{out}: exists already; give a new folder, or remove it first"]
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir():
        return [f"{out}: {parent} is not a folder"]
    remnants = _partial(out).rglob("*")  # of a conversion that was killed; they will give way
    free = shutil.disk_usage(parent).free + sum(path.stat().st_size for path in remnants if path.is_file())
    if size > free:
        return [f"{out}: needs {size / 1e9:,.1f} GB of disk, {free / 1e9:,.1f} GB are free"]
    return []


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` to write to, which becomes `out` if nothing is raised, and is removed if so.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    partial = _partial(out)
    try:
        with _locked(partial):
            try:
                for remnant in partial.iterdir():  # of a conversion that was killed
                    shutil.rmtree(remnant) if remnant.is_dir() else remnant.unlink()
                yield partial
                sync(partial)
                partial.rename(out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync(out.parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder that no other process writes to meanwhile, nor did before it ended, however it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # it will be emptied
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another conversion is writing it; wait for it to end") from None
    finally:
        os.close(descriptor)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """`source`: a folder, or a sentencepiece model."""
    folder.mkdir(exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, folder / SENTENCEPIECE_FILE)
        (folder / CONFIG_FILE).write_text("{}\n", encoding="utf-8")
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def fit_to_model(folder: Path) -> None:
    """Let transformers make of the tokenizer in `folder` what the model beside it takes, by its own code alone."""
    config = TokenizerFiles.read(folder).config
    config.pop("auto_map", None)
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # transformers 4 adds token_type_ids
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bos_id(folder: Path) -> int | None:
    """Of the token that the tokenizer's config names as beginning of text, if it names one that is there."""
    files = TokenizerFiles.read(folder)
    entry = files.config.get("bos_token")
    token = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(token, str) or not files.has(token):
        return None
    if files.tokenizers is not None:
        return files.tokenizers.token_to_id(token)
    return None if files.sentencepiece is None else files.sentencepiece.vocab[token]
