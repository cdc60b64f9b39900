"""Import from Hugging Face format: an exported or released folder as initial weights. Its code is never run."""

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from ruamel.yaml import YAML
from torch import Tensor

from llada_train.checkpoint.header import Entry, read_header
from llada_train.checkpoint.manifest import (
    FILE_NAME,
    FORMAT,
    TOKENIZER,
    FragmentEntry,
    ImportedManifest,
    write_manifest,
)
from llada_train.checkpoint.store import FOLDER as CHECKPOINTS
from llada_train.checkpoint.tensor_file import ITEM, write_tensors
from llada_train.config.errors import UserError
from llada_train.config.load import model_differences
from llada_train.config.schema import ModelConfig
from llada_train.convert.llada import LLADA
from llada_train.convert.names import Family, Run, sources
from llada_train.convert.output import copy_tokenizer, new_folder, output_problems
from llada_train.data.tokenizer import Tokenizer
from llada_train.model.sizes import MASTER, tensor_specs

FAMILIES: dict[str, Family] = {LLADA.model_type: LLADA}

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # each of their values is an fp32
_CHUNK = 1 << 21  # elements read at once
_FILE_BYTES = 4 * 10**9  # of imported weights: several ranks compare several files at once
_LISTED = 50


class HfWeights:
    """The global tensors of a folder in Hugging Face format, read in pieces; a context manager."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig | None = None,
        tokenizer: Tokenizer | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        """Check config.json and every tensor's name, shape and dtype, by the files' headers alone.

        `model` and `tokenizer`: what they are wanted for. `problems`: what else is wrong, to be told together.

        Raises:
            UserError: not a model that can be trained here, cut or missing files, tensors that are not those of
                config.json, another model than `model`, or other ids than `tokenizer`'s; all of it is listed.
        """
        self.folder = folder
        _check_is_folder(folder)
        found = list(problems)
        with ExitStack() as stack:
            self._tensors, unread = _open_tensors(folder, stack, found)
            anything_read = bool(self._tensors) or not found
            config = _read_json(folder / "config.json", found)
            if config is not None and tokenizer is not None:
                found += _other_ids(config, tokenizer)
            if config is not None and (understood := _understand(config, found)):
                self._family, self.model = understood
                found += self._wrong_tensors(unread) if anything_read else []
                found += [] if model is None else _another_model(self.model, model)
            if found:
                raise _refusal(folder, found)
            self._stack = stack.pop_all()
        self._sources = sources(self._family, self.model)
        if model is not None:
            self.model = model  # which may leave out rows that only pad the vocabulary
        self._specs = tensor_specs(self.model)

    def __enter__(self) -> "HfWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._specs)

    def read(self, name: str) -> Tensor:
        """Our global tensor `name`, fp32."""
        spec = self._specs[name]
        return self.read_runs(name, [(0, spec.numel)]).view(spec.shape)

    def read_runs(self, name: str, runs: Iterable[Run]) -> Tensor:
        """Ranges (start, length) of our flattened global tensor, one after the other. [Σ length] fp32."""
        wanted = list(runs)
        out, filled = torch.empty(sum(length for _, length in wanted)), 0
        for start, length in wanted:
            for theirs, offset, count in self._places(name, start, length):
                out[filled : filled + count] = self._elements(theirs, offset, count)
                filled += count
        return out

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The elements of our global tensor `name` in order, a few million at a time; flat fp32."""
        for theirs, offset, count in self._places(name, 0, self._specs[name].numel):
            yield self._elements(theirs, offset, count)

    def _places(self, name: str, start: int, length: int) -> Iterator[tuple[str, int, int]]:
        """(their tensor, offset in it, elements, a few million at most) that together hold [start, start + length)."""
        parts = self._sources[name]
        number = bisect_right(parts, start, key=lambda part: part[0]) - 1
        while length:
            first, size, theirs, offset = parts[number]
            count = min(length, first + size - start, _CHUNK)
            yield theirs, offset + start - first, count
            start, length = start + count, length - count
            number += start == first + size

    def _elements(self, theirs: str, start: int, count: int) -> Tensor:
        file, entry = self._tensors[theirs]
        out = torch.empty(count, dtype=_DTYPES[entry.dtype])
        content = out.view(torch.uint8).numpy().data
        try:
            file.seek(entry.start + start * out.itemsize)
            read = file.readinto(content)  # type: ignore[attr-defined]
        except OSError as error:
            raise UserError(f"{file.name}: cannot be read: {error.strerror}") from None
        if read != len(content):
            raise UserError(f"{file.name}: has been cut while it was read")
        return out.float()

    def _wrong_tensors(self, unread: Collection[str]) -> list[str]:
        """`unread`: tensors whose files could not be read, of which nothing more is said."""
        if self.model.num_layers > len(self._tensors) + len(unread):  # before a table of so many is made
            return [f"config.json: {self.model.num_layers:,} layers, but {len(self._tensors):,} tensors"]
        expected = {theirs: piece.shape for theirs, piece in self._family.pieces(self.model).items()}
        wrong = [f"{name}: missing" for name in expected if name not in self._tensors and name not in unread]
        for name, (_, entry) in self._tensors.items():
            if name not in expected:
                wrong.append(f"{name}: not a tensor of the model that config.json describes")
                continue
            if entry.shape != expected[name]:
                wrong.append(f"{name}: shape {list(entry.shape)}, by config.json {list(expected[name])}")
            if entry.dtype not in _DTYPES:
                wrong.append(f"{name}: dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}")
        return wrong


def from_hf(folder: Path, out: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> ModelConfig:
    """Write the weights as a checkpoint to begin runs from, and return the sizes of their model.

    The new folder `out` holds fp32 weights, the tokenizer and `model.yaml`, and appears only when complete. Memory
    holds a few million elements at a time. `on_progress` gets (bytes written, bytes in all).

    Raises:
        UserError: the folder or its tokenizer do not fit, or `out` cannot be made; all that is wrong is listed.
    """
    _check_is_folder(folder)
    problems = output_problems(out, 0)
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError as error:
        problems.append(str(error))
    with HfWeights(folder, tokenizer=tokenizer, problems=problems) as weights, ExitStack() as stack:
        total = sum(spec.numel for spec in tensor_specs(weights.model).values()) * ITEM
        if problems := output_problems(out, total):
            raise _refusal(folder, problems)
        partial = stack.enter_context(new_folder(out))
        _write_weights(weights, partial, lambda done: on_progress(done, total))
        copy_tokenizer(folder, partial / TOKENIZER)
        with (partial / "model.yaml").open("w", encoding="utf-8") as file:
            YAML(typ="rt").dump(weights.model.model_dump(mode="json"), file)
        return weights.model


def _check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give one in Hugging Face format, downloaded before (`hf download MODEL "
            "--local-dir FOLDER`)"
        )
    if (folder / "config.json").exists():
        return
    if (folder / FILE_NAME).exists() or (folder / CHECKPOINTS).exists():
        raise UserError(f"{folder}: a checkpoint or a run of llada_train already; begin a run with init_from={folder}")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: an adapter; merge it into its model (peft: merge_and_unload) and save that")


def _write_weights(weights: HfWeights, folder: Path, on_bytes: Callable[[int], None]) -> None:
    specs, done = tensor_specs(weights.model), 0

    def counted(names: Sequence[str]) -> Iterator[Tensor]:
        nonlocal done
        for name in names:
            for part in weights.chunks(name):
                yield part
                done += part.nbytes
                on_bytes(done)

    files, tensors = {}, {}
    for number, names in enumerate(_grouped({name: spec.numel * ITEM for name, spec in specs.items()})):
        file = f"weights-{number:05d}.safetensors"
        sizes = {f"{MASTER}/{name}": specs[name].numel for name in names}
        files[file] = write_tensors(folder / file, sizes, counted(names))
        for name in names:
            tensors[name] = [FragmentEntry(file=file, index=0, count=1, start=0, stop=specs[name].numel)]
    manifest = ImportedManifest(
        format=FORMAT,
        saved=datetime.now(UTC),
        versions={"llada-train": version("llada-train")},
        imported_from=weights.folder.absolute().name,
        model=weights.model,
        files=files,
        tensors=tensors,
    )
    write_manifest(folder, manifest)


def _grouped(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in groups of at most _FILE_BYTES or a single one."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > _FILE_BYTES:
            groups.append([])
        groups[-1].append(name)
    return groups


def _open_tensors(
    folder: Path, stack: ExitStack, problems: list[str]
) -> tuple[dict[str, tuple[IO[bytes], Entry]], set[str]]:
    """The open file that holds each tensor, and where; and the tensors whose file cannot be read."""
    tensors: dict[str, tuple[IO[bytes], Entry]] = {}
    unread: set[str] = set()
    weight_map = _weight_map(folder, problems)
    for name in [_SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        try:
            file = stack.enter_context((folder / name).open("rb"))
            header = read_header(file)
        except (OSError, ValueError) as error:
            absent = isinstance(error, FileNotFoundError)
            wrong = "the file is missing" if absent else f"cut or damaged ({getattr(error, 'strerror', None) or error})"
            problems.append(f"{name}: {wrong}; copy or download it again")
            unread |= {tensor for tensor, place in (weight_map or {}).items() if place == name}
            continue
        for tensor, entry in header.items():
            if weight_map is not None and weight_map.get(tensor) != name:
                problems.append(f"{tensor}: in {name}, where {_INDEX} does not have it")
            tensors[tensor] = file, entry
    return tensors, unread


def _weight_map(folder: Path, problems: list[str]) -> dict[str, str] | None:
    """The file of each tensor by the index; None: all are in one."""
    has_index, has_single = ((folder / name).exists() for name in (_INDEX, _SINGLE))
    if has_index == has_single:
        both = f"{_SINGLE} and {_INDEX}: which of the two is meant? remove the other"
        problems.append(both if has_index else f"neither {_SINGLE} nor {_INDEX}: only safetensors are read")
        return {}
    if has_single:
        return None
    index = _read_json(folder / _INDEX, problems)
    if index is None:
        return {}
    weight_map = index.get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) and weight_map else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        problems.append(f"{_INDEX}: weight_map has to give each tensor the name of a file beside it")
        return {}
    return weight_map


def _understand(config: dict[str, Any], problems: list[str]) -> tuple[Family, ModelConfig] | None:
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(repr(model_type) for model_type in FAMILIES)
        problems.append(
            f"config.json: model_type is {config.get('model_type')!r} ({config.get('architectures')}), expected {known}"
            "; another family's weights, such as a causal model's, are not a LLaDA's"
        )
        return None
    try:
        return family, family.model_config(config)
    except ValueError as error:
        problems += [f"config.json: {line}" for line in str(error).splitlines()]
        return None


def _another_model(theirs: ModelConfig, wanted: ModelConfig) -> list[str]:
    lines = model_differences(theirs, wanted)
    return [f"another model than the config's: model.{line} (stored there → given now)" for line in lines]


def _other_ids(config: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    wrong = [
        f"config.json: {key} is {config[key]!r}, but the tokenizer's is {ours}"
        for key, ours in (("mask_token_id", tokenizer.mask_id), ("eos_token_id", tokenizer.eos_id))
        if config.get(key) not in (None, ours)
    ]
    rows = config.get("embedding_size") or config.get("vocab_size")
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        wrong.append(f"config.json: the embedding has {rows} rows, but the tokenizer {tokenizer.vocab_size} ids")
    return wrong


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name}: no such file; give a folder in Hugging Face format")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: cannot be read: {error}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: expected a JSON object")
        return None
    return value


def _refusal(folder: Path, problems: Sequence[str]) -> UserError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return UserError("\n  ".join([f"{folder}: {count}, nothing was done:", *problems[:_LISTED], *more]))
