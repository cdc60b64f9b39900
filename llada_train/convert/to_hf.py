"""Export to Hugging Face format: a folder that transformers loads with `trust_remote_code=True`."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig

from llada_train.checkpoint.header import header_bytes
from llada_train.checkpoint.manifest import Manifest
from llada_train.checkpoint.reader import Checkpoint
from llada_train.config.errors import UserError
from llada_train.convert.card import model_card
from llada_train.convert.llada import LLADA
from llada_train.convert.names import Family, Piece, Run, SpecialTokens
from llada_train.convert.output import bos_id, copy_tokenizer, fit_to_model, new_folder, output_problems
from llada_train.data.chat import template_source
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.sizes import MASTER, parameter_count

# As an argument names it, as a safetensors header does, and as torch does.
_DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
_CHUNK = 1 << 21  # elements converted at once


def check_export(checkpoint: Checkpoint, out: Path, dtype: str) -> Tokenizer:
    """What can be at fault before any tensor is read; returns the tokenizer.

    Raises:
        UserError: `out` exists already or cannot be written, the run's tokenizer cannot be read or is another model's,
            or another dtype than bf16 and fp32; all that is wrong is listed.
    """
    problems = [] if dtype in _DTYPES else [f"dtype {dtype!r}: give one of {', '.join(_DTYPES)}"]
    model = checkpoint.model
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = Tokenizer.load(checkpoint.tokenizer)
        if tokenizer.vocab_size > model.vocab_size:
            ids = f"{tokenizer.vocab_size:,} ids, the model {model.vocab_size:,}"
            problems.append(f"{checkpoint.tokenizer}: not the tokenizer that the model was trained with: it has {ids}")
    except UserError as error:
        where = "" if checkpoint.tokenizer.is_absolute() else f", looked for from {Path.cwd()}"
        problems.append(f"the run's data.tokenizer{where}: {error}")
    _, torch_dtype = _DTYPES.get(dtype, _DTYPES["fp32"])
    problems += output_problems(out, parameter_count(model) * torch_dtype.itemsize)
    if tokenizer is None or problems:
        raise UserError("\n  ".join(["nothing was written:", *problems]) if problems[1:] else problems[0])
    return tokenizer


def to_hf(
    checkpoint: Checkpoint,
    out: Path,
    dtype: str = "bf16",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_bytes: int = 5 * 10**9,
    family: Family = LLADA,
) -> None:
    """Write weights, config, tokenizer, modelling code and a model card to the new folder `out`.

    It appears only when complete. `dtype` of the weights: bf16, as LLaDA's release, or fp32. Memory holds a few million
    elements at a time. `on_progress` gets (bytes written, bytes in all).

    Raises:
        UserError: as `check_export`.
        DamagedError: a file of the checkpoint is cut.
    """
    tokenizer = check_export(checkpoint, out, dtype)
    label, torch_dtype = _DTYPES[dtype]
    pieces = family.pieces(checkpoint.model)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(piece.shape, dtype=torch_dtype, device="meta") for name, piece in pieces.items()},
        max_shard_size=max_shard_bytes,
    )
    total: int = plan.metadata["total_size"]
    done = 0
    with new_folder(out) as folder:
        for file, names in plan.filename_to_tensors.items():
            shapes = {name: pieces[name].shape for name in names}
            with (folder / file).open("wb") as stream:
                stream.write(header_bytes(shapes, label, {"format": "pt"}))
                for part in _parts(checkpoint, [pieces[name] for name in names]):
                    stream.write(part.to(torch_dtype).view(torch.uint8).numpy().data)
                    done += part.numel() * torch_dtype.itemsize
                    on_progress(done, total)
                stream.flush()
                os.fsync(stream.fileno())
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        config = family.hf_config(checkpoint.model, SpecialTokens(tokenizer.mask_id, tokenizer.eos_id))
        config.dtype = torch_dtype
        config.save_pretrained(folder)
        for module in family.code:
            source = Path(inspect.getfile(module))
            shutil.copyfile(source, folder / source.name)
        copy_tokenizer(checkpoint.tokenizer, folder)
        fit_to_model(folder)
        if isinstance(manifest := checkpoint.manifest, Manifest) and manifest.config.sft is not None:
            _write(folder / "chat_template.jinja", template_source(manifest.config.sft.chat_template))
        GenerationConfig(
            bos_token_id=bos_id(folder),
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        ).save_pretrained(folder)
        _write(folder / "README.md", model_card(out.name, checkpoint.manifest, dtype))


def _parts(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> Iterator[Tensor]:
    """The elements of their tensors, one after the other, a few million at a time; flat fp32."""
    for piece in pieces:
        for runs in _cut(piece.runs):
            yield checkpoint.read_runs(piece.name, MASTER, runs)


def _cut(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The same ranges in groups of at most _CHUNK elements."""
    group: list[Run] = []
    room = _CHUNK
    for start, length in runs:
        while length:
            count = min(length, room)
            group.append((start, count))
            start, length, room = start + count, length - count, room - count
            if not room:
                yield group
                group, room = [], _CHUNK
    if group:
        yield group


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
