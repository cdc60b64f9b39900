"""Small checkpoints, written by hand in any layout."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llada_train.checkpoint.manifest import (
    CHECKSUM_NAME,
    FILE_NAME,
    FORMAT,
    FileEntry,
    FragmentEntry,
    Manifest,
    Progress,
    write_manifest,
)
from llada_train.checkpoint.tensor_file import sha256
from llada_train.config.schema import Config, ModelConfig
from llada_train.model.sizes import TensorSpec, tensor_specs

CONFIG = Config.model_validate(
    {
        "run_dir": "run",
        "model": {
            "num_layers": 1,
            "hidden_size": 16,
            "num_heads": 4,
            "num_kv_heads": 4,
            "ffn_hidden_size": 12,
            "vocab_size": 100,
        },
        "data": {"tokenizer": "tokenizer", "sequence_length": 8, "corpora": [{"path": "corpus"}]},
        "optimizer": {"learning_rate": [{"until_tokens": 1000, "end": 1e-3}]},
        "training": {"global_batch_size": 4, "micro_batch_size": 2},
    }
)
SPECS = tensor_specs(CONFIG.model)
KINDS = ("master", "exp_avg", "exp_avg_sq")


def global_tensors(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    specs = tensor_specs(model)
    return {f"{kind}/{name}": torch.randn(s.shape, generator=generator) for kind in KINDS for name, s in specs.items()}


TENSORS = global_tensors(CONFIG.model)


def slices(full: Tensor, name: str, count: int, specs: Mapping[str, TensorSpec] = SPECS) -> list[Tensor]:
    """Tensor parallelism's cut, by torch: the oracle of every range computed in llada_train."""
    dim = specs[name].partition_dim
    return [full] if dim is None else list(full.chunk(count, dim))


def write(
    folder: Path,
    tensor_parallel: int = 2,
    cuts: Callable[[int], list[int]] = lambda n: [n // 3],
    step: int = 3,
    config: Config = CONFIG,
    tensors: Mapping[str, Tensor] = TENSORS,
) -> Path:
    """A checkpoint in which each tensor's flat slices are cut at `cuts(elements)`, each piece in another file."""
    folder.mkdir(parents=True)
    specs = tensor_specs(config.model)
    content: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, list[FragmentEntry]] = {name: [] for name in specs}
    for name in specs:
        count = len(slices(tensors[f"master/{name}"], name, tensor_parallel, specs))
        for index in range(count):
            numel = specs[name].numel // count
            borders = [0, *sorted(cuts(numel)), numel]
            for part, (start, stop) in enumerate(pairwise(borders)):
                file = f"rank-{part * count + index:05d}.safetensors"
                entries[name].append(FragmentEntry(file=file, index=index, count=count, start=start, stop=stop))
                for kind in KINDS:
                    piece = slices(tensors[f"{kind}/{name}"], name, tensor_parallel, specs)[index]
                    content.setdefault(file, {})[f"{kind}/{name}"] = piece.flatten()[start:stop].clone()
    for file, pieces in content.items():
        save_file(pieces, folder / file)
    manifest = Manifest(
        format=FORMAT,
        corpora=(),
        saved=datetime.now(UTC),
        progress=Progress(step=step, consumed_samples=4 * step),
        optimizer_steps=step,
        versions={},
        config=config,
        files={f: FileEntry(size=(folder / f).stat().st_size, sha256=sha256(folder / f)) for f in content},
        tensors=entries,
    )
    write_manifest(folder, manifest)
    return folder


def write_text(folder: Path, content: bytes) -> None:
    """A manifest that somebody made up, with a checksum that fits."""
    (folder / FILE_NAME).write_bytes(content)
    (folder / CHECKSUM_NAME).write_text(f"{sha256(folder / FILE_NAME)}  {FILE_NAME}\n")
