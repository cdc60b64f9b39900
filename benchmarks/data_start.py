"""How long data takes to start, and how fast it comes, at trillions of tokens.

- 2.3 trillion tokens in 64 corpora of 30 million documents each (sparse files; the index is one file, linked): the
  first batch of some rank at some step, in a fresh process, with packed rows and with document attention.
- One corpus of 1,000-token documents, of ever more tokens: the first batch, against the index that megatron-core's
  GPTDataset builds before its first sample.
- Rows per second of one loader thread at sequence length 4,096, noise included.

    python benchmarks/data_start.py                     # tables, picture, and benchmarks/results/data_start_DATE.*
    python benchmarks/data_start.py --largest 4e11      # how far megatron-core is asked to go: 32 bytes a document
    python benchmarks/data_start.py --no-write

The documents end in the end-of-text token where they are read: those places are written, the rest of a file is a hole.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, machine_and_versions

from llada_train.data.indexed import HEADER, MAGIC, VERSION

CORPORA, DOCUMENTS, DOCUMENT_LENGTH = 64, 30_000_000, 1_200  # 2.3 trillion tokens
SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE, DATA_PARALLEL = 4_096, 1_280, 64
VOCABULARY = 126_464  # LLaDA's
EOS = 0
REPEATS = 5
CHUNK = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description="How long data takes to start, and how fast it comes.")
    parser.add_argument("--largest", type=float, default=1e11, help="tokens of the largest index of megatron-core")
    parser.add_argument("--no-write", action="store_true", help="print the tables only")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *rest = arguments.worker
        print(json.dumps(WORKERS[kind](*rest)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        report = [start_table(folder), rate_table(folder)]
        ours, theirs = curves(folder, arguments.largest)
        report.append(curve_table(ours, theirs))
    print("\n\n".join(report))
    if not arguments.no_write:
        path = ROOT / f"benchmarks/results/data_start_{date.today().isoformat()}"
        draw(path.with_suffix(".png"), ours, theirs)
        header = f"# How long data takes to start, {date.today().isoformat()}\n\n{machine_and_versions()}\n"
        how = f"- `python benchmarks/data_start.py --largest {arguments.largest:.0e}`\n"
        picture = f"![seconds and memory over tokens]({path.name}.png)"
        path.with_suffix(".md").write_text("\n\n".join([header + how, *report, picture]) + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}.md and .png")


def start_table(folder: Path) -> str:
    lines = [
        f"{CORPORA} corpora × {DOCUMENTS:,} documents × {DOCUMENT_LENGTH:,} tokens = "
        f"{CORPORA * DOCUMENTS * DOCUMENT_LENGTH:.2e} tokens; batches of {GLOBAL_BATCH_SIZE:,} × {SEQUENCE_LENGTH:,}, "
        f"rank 37 of {DATA_PARALLEL} at step 200,000; median of {REPEATS} processes. From the config to the batch, "
        "without imports; the whole process from its start, imports of torch and all; its memory, and that of a "
        "process that only imports torch.",
        "",
        "| rows | to the batch, s | whole, s | memory, MB | torch alone, MB |",
        "|---|---|---|---|---|",
    ]
    with corpora(folder, CORPORA, DOCUMENTS, DOCUMENT_LENGTH) as prefixes:
        for rows in ("packed", "document_attention"):
            config = write_config(folder, prefixes, rows)
            write_what_is_read(config, 200_000, DOCUMENT_LENGTH)
            found = [worker("first_batch", config, 200_000, 37) for _ in range(REPEATS)]
            values = [statistics.median(one[key] for one in found) for key in ("seconds", "whole", "mb")]
            lines.append("| {} | {:.2f} | {:.2f} | {:.0f} | {:.0f} |".format(rows, *values, worker("torch")["mb"]))
    return "\n".join(lines)


def rate_table(folder: Path) -> str:
    lines = [
        f"Rows of {SEQUENCE_LENGTH:,} tokens that one loader thread makes in a second, noise and collation included, "
        "read from the page cache; and what share of a rank's step it takes where a GPU trains LLaDA 8B at 40 % of an "
        "H800's 989 TFLOP/s (a thread works ahead, so that any share under 100 % costs nothing).",
        "",
        "| rows | rows/s | tokens/s | share of a step |",
        "|---|---|---|---|",
    ]
    tokens_per_second = 0.4 * 989e12 / (6 * 7.5e9 + 12 * 32 * 4096 * 4096)
    with corpora(folder, 4, 1_000_000, DOCUMENT_LENGTH) as prefixes:
        for rows in ("packed", "document_attention"):
            config = write_config(folder, prefixes, rows)
            rate = worker("rows", config)["rows_per_second"]
            share = tokens_per_second / (rate * SEQUENCE_LENGTH)
            lines.append(f"| {rows} | {rate:,.0f} | {rate * SEQUENCE_LENGTH:,.0f} | {share:.2%} |")
    return "\n".join(lines)


Curve = dict[float, tuple[float, float]]  # tokens → seconds, MB


def curves(folder: Path, largest: float) -> tuple[Curve, Curve]:
    ours: Curve = {}
    theirs: Curve = {}
    for tokens in (1e8, 1e9, 1e10, 3e10, 1e11, 2e11, 4e11):
        with corpora(folder, 1, int(tokens) // 1000, 1000) as (prefix,):
            config = write_config(folder, [prefix], "packed", batch=256)
            write_what_is_read(config, 1, 1000)
            one = worker("first_batch", config, 1, 0)
            ours[tokens] = one["seconds"], one["mb"]
            if tokens <= largest:
                found = worker("megatron", prefix, folder / "cache")
                theirs[tokens] = found["seconds"], found["mb"]
    return ours, theirs


def curve_table(ours: Curve, theirs: Curve) -> str:
    lines = [
        "One corpus of 1,000-token documents: the first batch here, the index of one epoch and the first sample with "
        "megatron-core's GPTDataset; one process each, after their imports.",
        "",
        "| tokens | here, s | here, MB | megatron-core, s | megatron-core, MB |",
        "|---|---|---|---|---|",
    ]
    for tokens, (seconds, mb) in ours.items():
        other = "{:.1f} | {:,.0f}".format(*theirs[tokens]) if tokens in theirs else "not asked | "
        lines.append(f"| {tokens:.0e} | {seconds:.2f} | {mb:,.0f} | {other} |")
    return "\n".join(lines)


def draw(path: Path, ours: Curve, theirs: Curve) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    for axes, number, label in zip(figure.subplots(1, 2), (0, 1), ("seconds to the first batch", "MB"), strict=True):
        for curve, name, color in ((theirs, "megatron-core", "tab:gray"), (ours, "llada_train", "tab:blue")):
            axes.plot(list(curve), [values[number] for values in curve.values()], "o-", color=color, label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens in the corpus", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


@contextmanager
def corpora(folder: Path, count: int, documents: int, length: int) -> Iterator[list[Path]]:
    """Corpora of empty tokens, whose documents are equally long: holes, and one index that all share."""
    prefixes = [folder / f"corpus-{i:02}" for i in range(count)]
    index = prefixes[0].with_suffix(".idx")
    with index.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 4, documents, documents + 1))
        for kind, scale, offset, entries in (("<i4", 0, length, documents), ("<i8", length * 4, 0, documents)):
            for first in range(0, entries, CHUNK):
                numbers = np.arange(first, min(first + CHUNK, entries), dtype="<i8") * scale + offset
                file.write(numbers.astype(kind).tobytes())
        for first in range(0, documents + 1, CHUNK):
            file.write(np.arange(first, min(first + CHUNK, documents + 1), dtype="<i8").tobytes())
    for prefix in prefixes:
        with prefix.with_suffix(".bin").open("wb") as file:
            file.truncate(documents * length * 4)
        if prefix != prefixes[0]:
            os.link(index, prefix.with_suffix(".idx"))
    try:
        yield prefixes
    finally:
        for prefix in prefixes:
            for suffix in (".bin", ".idx"):
                prefix.with_suffix(suffix).unlink()


def write_what_is_read(config_file: Path, step: int, length: int) -> None:
    """Real-looking tokens where a step and the checks before it read: words, and an EOS at each document's end."""
    from llada_train.config.load import load_config
    from llada_train.data.rows import PretrainingData

    data = PretrainingData(load_config(config_file))
    pick = np.random.default_rng(0)
    first = data.timeline.first_sample(step)
    stretches = [
        (s.corpus, s.start, s.stop)
        for s in data.training_stretches(range(first, first + data.timeline.phase(first).global_batch_size))
    ]
    for c, corpus in enumerate(data.corpora):
        ends = [(i + 1) * length for i in corpus.sampled_documents]
        stretches += [(c, end - 1, end) for end in ends]
    for c, start, stop in stretches:
        tokens = pick.integers(1, VOCABULARY, stop - start, dtype="<i4")
        tokens[(np.arange(start, stop) + 1) % length == 0] = EOS
        with Path(f"{data.corpora[c].prefix}.bin").open("r+b") as file:
            file.seek(start * 4)
            file.write(tokens.tobytes())


def make_tokenizer(folder: Path) -> None:
    """As many tokens as LLaDA has, of bytes, pairs and triples of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<|mdm_mask|>", *letters])}
    merges: list[tuple[str, str]] = []
    for left in [*letters, *(a + b for a in letters for b in letters)]:
        for right in letters:
            if len(vocabulary) < VOCABULARY:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "mask_token": "<|mdm_mask|>"}')


def write_config(folder: Path, prefixes: list[Path], rows: str, batch: int = GLOBAL_BATCH_SIZE) -> Path:
    tree = {
        "run_dir": str(folder / "run"),
        "model": str(ROOT / "configs/model/llada_8b.yaml"),
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": SEQUENCE_LENGTH,
            "rows": rows,
            "temperature": 1,
            "corpora": [{"path": str(prefix)} for prefix in prefixes],
        },
        "optimizer": {"learning_rate": [{"until_tokens": 2_300_000_000_000, "end": 1e-4}]},
        "training": {"global_batch_size": batch, "micro_batch_size": 4},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


def worker(*arguments: object) -> dict[str, Any]:
    """What the function prints in a fresh process, and how long the process takes."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return {**json.loads(said.splitlines()[-1]), "whole": time.perf_counter() - started}


def memory() -> float:
    """The most that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def first_batch(config_file: str, step: str, rank: str) -> dict[str, float]:
    """In the order of `llada-train pretrain`: data is opened before torch is imported."""
    from llada_train.config.load import load_config
    from llada_train.data.place import Place
    from llada_train.data.rows import PretrainingData

    started = time.perf_counter()
    config = load_config(Path(config_file))
    data = PretrainingData(config)
    data.check()
    opened = time.perf_counter() - started
    from llada_train.data.loader import TrainingLoader

    started = time.perf_counter()
    loader = TrainingLoader(data, config, Place(int(rank), DATA_PARALLEL))
    batches = loader.global_batch(data.timeline.first_sample(int(step)))
    made = time.perf_counter() - started
    assert len(batches) == config.training.global_batch_size // DATA_PARALLEL // 4
    return {"seconds": opened + made, "mb": memory()}


def torch_alone() -> dict[str, float]:
    import torch  # noqa: F401

    return {"mb": memory()}


def rows_per_second(config_file: str) -> dict[str, float]:
    """Of whole batches of one rank, in this thread; every row is read once before."""
    import torch

    from llada_train.config.load import load_config
    from llada_train.data.loader import TrainingLoader
    from llada_train.data.place import Place
    from llada_train.data.rows import PretrainingData

    torch.set_num_threads(1)
    config = load_config(Path(config_file))
    loader = TrainingLoader(PretrainingData(config), config, Place(0, DATA_PARALLEL))
    write_rows_of(config_file, 20)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        for step in range(20):
            loader.global_batch(step * GLOBAL_BATCH_SIZE)
        seconds.append(time.perf_counter() - started)
    return {"rows_per_second": 20 * GLOBAL_BATCH_SIZE / DATA_PARALLEL / seconds[-1]}


def write_rows_of(config_file: str, steps: int) -> None:
    for step in range(1, steps + 1):
        write_what_is_read(Path(config_file), step, DOCUMENT_LENGTH)


def megatron_index(prefix: str, cache: str) -> dict[str, float]:
    import logging
    from types import SimpleNamespace

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    logging.disable()
    tokens = Path(f"{prefix}.bin").stat().st_size // 4
    started = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=f"{cache}-{tokens}",
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=EOS, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [tokens // SEQUENCE_LENGTH - 1, 0, 0]
    training = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
    training[0]
    return {"seconds": time.perf_counter() - started, "mb": memory()}


WORKERS: dict[str, Callable[..., dict[str, float]]] = {
    "first_batch": first_batch,
    "torch": torch_alone,
    "rows": rows_per_second,
    "megatron": megatron_index,
}

if __name__ == "__main__":
    main()
