"""Time and memory of `llada-train convert` on a checkpoint of some shape, whose weights are all zero and take no disk.

`python benchmarks/conversion.py [configs/model/llada_8b.yaml] [--work FOLDER]`: to-hf from a sparse checkpoint, then
from-hf from a sparse folder, each in a process of its own, each output removed before the next is made. The 8B takes
32 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, date, datetime
from pathlib import Path

from common import ROOT, machine_and_versions
from ruamel.yaml import YAML

from data_tools.train_tokenizer import train_tokenizer
from llada_train.checkpoint.header import header_bytes
from llada_train.checkpoint.manifest import (
    FORMAT,
    TOKENIZER,
    FileEntry,
    FragmentEntry,
    ImportedManifest,
    write_manifest,
)
from llada_train.checkpoint.tensor_file import sha256
from llada_train.config.schema import ModelConfig
from llada_train.convert.llada import LLADA
from llada_train.convert.names import SpecialTokens
from llada_train.model.sizes import parameter_count, tensor_specs

TINY = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, ffn_hidden_size=8, vocab_size=300)


def sparse(path: Path, header: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def sparse_checkpoint(folder: Path, model: ModelConfig) -> None:
    """As from-hf writes it, one tensor to a file."""
    folder.mkdir()
    files, tensors = {}, {}
    for number, (name, spec) in enumerate(tensor_specs(model).items()):
        file = f"weights-{number:05d}.safetensors"
        sparse(folder / file, header_bytes({f"master/{name}": (spec.numel,)}), 4 * spec.numel)
        files[file] = FileEntry(size=(folder / file).stat().st_size, sha256=sha256(folder / file))
        tensors[name] = [FragmentEntry(file=file, index=0, count=1, start=0, stop=spec.numel)]
    made = {"format": FORMAT, "saved": datetime.now(UTC), "versions": {}, "imported_from": "zeros", "model": model}
    write_manifest(folder, ImportedManifest(**made, files=files, tensors=tensors))
    tokenizer(folder / TOKENIZER)


def sparse_hf_folder(folder: Path, model: ModelConfig) -> None:
    folder.mkdir()
    shapes = {name: piece.shape for name, piece in LLADA.pieces(model).items()}
    sparse(folder / "model.safetensors", header_bytes(shapes, "BF16", {"format": "pt"}), 2 * parameter_count(model))
    tokenizer(folder)
    LLADA.hf_config(model, SpecialTokens()).save_pretrained(folder)


def tokenizer(folder: Path) -> None:
    train_tokenizer(iter(["the quick brown fox"]), 300, folder)


def measured(*arguments: object) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in bytes."""
    command = [sys.executable, "-m", "llada_train.cli", "convert", *map(str, arguments)]
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", nargs="?", type=Path, default=ROOT / "configs" / "model" / "llada_8b.yaml")
    arguments.add_argument("--work", type=Path, default=None)
    given = arguments.parse_args()
    model = ModelConfig.model_validate(YAML(typ="safe").load(given.model))
    work = Path(tempfile.mkdtemp(prefix="conversion-", dir=given.work))
    rows = []
    try:
        for direction, make, written in (("to-hf", sparse_checkpoint, 2), ("from-hf", sparse_hf_folder, 4)):
            size = written * parameter_count(model)
            if shutil.disk_usage(work).free < 1.2 * size:
                sys.exit(f"{work}: {direction} writes {size / 1e9:.1f} GB; there is no room for it")
            make(work / "tiny", TINY)
            _, alone = measured(direction, work / "tiny", work / "out")
            shutil.rmtree(work / "out")
            make(work / "in", model)
            seconds, peak = measured(direction, work / "in", work / "out")
            for folder in ("tiny", "in", "out"):
                shutil.rmtree(work / folder)
            rows.append((direction, size, seconds, peak, alone))
            print(json.dumps(rows[-1]), flush=True)
    finally:
        shutil.rmtree(work)
    largest = 4 * max(spec.numel for spec in tensor_specs(model).values())
    lines = [
        f"# Conversion, {date.today()}",
        "",
        machine_and_versions(),
        f"- {parameter_count(model):,} parameters ({given.model.name}), all zero; largest tensor "
        f"{largest / 2**20:,.0f} MiB as fp32, {largest / 2**21:,.0f} as bf16; `python benchmarks/conversion.py`",
        f"- load average {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores: other programs were at work",
        "",
        "| | written, GB | seconds | GB/s | peak memory, MiB | of which the same command on a tiny model |",
        "|---|---|---|---|---|---|",
        *(
            f"| {direction} | {size / 1e9:.1f} | {seconds:.0f} | {size / 1e9 / seconds:.2f} | {peak / 2**20:,.0f} | "
            f"{alone / 2**20:,.0f} |"
            for direction, size, seconds, peak, alone in rows
        ),
        "",
        "to-hf compares the checksums of what it reads first; from-hf reads back what it has written.",
    ]
    out = ROOT / "benchmarks" / "results" / f"conversion_{date.today()}.md"
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
