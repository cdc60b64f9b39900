"""From text to a corpus: `llada-data tokenize`, Megatron-LM's preprocess_data.py, and `datasets.map`.

Each tokenizes the same .jsonl of Python sources with the same byte-level BPE and as many processes; then the same with
one document, whose time is start-up and is taken off. CPU seconds are those of all processes, memory is the largest sum
of their proportional set sizes. The ids have to be the same.

    python benchmarks/tokenizing.py --megatron PATH     # a checkout of Megatron-LM; without it, ours and datasets only
    python benchmarks/tokenizing.py --no-write
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from common import ROOT, machine_and_versions

from data_tools.train_tokenizer import train_tokenizer
from llada_train.data.corpus import Corpus

VOCAB_SIZE = 32_000
PROCESSES = 2
INTERVAL = 0.1  # seconds between looks at the memory
DATASETS_MAP = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
text, tokenizer, out, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
def encode(batch):
    ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return {"ids": [document + [tokenizer.eos_token_id] for document in ids]}
data = load_dataset("json", data_files=text, split="train", cache_dir=out + ".cache")
data = data.map(encode, batched=True, num_proc=int(processes) if len(data) > 1 else None, remove_columns=["text"])
data.save_to_disk(out)
"""


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds
    memory: int  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="From text to a corpus, three ways.")
    parser.add_argument("--megatron", type=Path, metavar="PATH", help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=30, help="of text (default 30)")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = collect(folder, arguments.megabytes << 20)
        rows, tokens = {}, 0
        for way, command in commands(folder, arguments.megatron).items():
            print(f"{way} …", flush=True)
            one = measure(command(folder / "one.jsonl", folder / f"{way}-one"), arguments.megatron)
            rows[way] = one, measure(command(folder / "text.jsonl", folder / way), arguments.megatron)
        tokens = Corpus(folder / "llada-data").num_tokens
        compare(folder, rows)
    report = table(rows, tokens)
    print(report)
    if not arguments.no_write:
        today = date.today().isoformat()
        path = ROOT / f"benchmarks/results/tokenizing_{today}.md"
        libraries = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "tiktoken", "datasets"))
        how = (
            f"- {libraries}; load average {os.getloadavg()[0]:.1f} at the end\n- {documents:,} Python sources, "
            f"{tokens:,} tokens, byte-level BPE of {VOCAB_SIZE:,}, {PROCESSES} processes each; "
            f"`python benchmarks/tokenizing.py --megatron PATH --megabytes {arguments.megabytes}`\n"
        )
        if arguments.megatron:
            how += f"- Megatron-LM: {megatron_version(arguments.megatron)}\n"
        path.write_text(
            f"# From text to a corpus, {today}\n\n{machine_and_versions()}\n{how}\n{report}\n", encoding="utf-8"
        )
        print(f"wrote {path.relative_to(ROOT)}")


def collect(folder: Path, size: int) -> int:
    """`text.jsonl`, `one.jsonl` and `tokenizer/` from the Python sources of this interpreter; how many documents."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) + sorted(
        Path(sysconfig.get_path("purelib")).rglob("*.py")
    ):
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            if text.strip() and "\0" not in text:
                texts.append(text)
                size -= len(text)
        if size < 0:
            break
    for name, some in (("text", texts), ("one", texts[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    train_tokenizer(iter(texts[::5]), VOCAB_SIZE, folder / "tokenizer")
    return len(texts)


def commands(folder: Path, megatron: Path | None):
    tokenizer = str(folder / "tokenizer")
    ways = {
        "llada-data": lambda text, out: [
            *(sys.executable, "-m", "data_tools.cli", "tokenize", text, "--tokenizer", tokenizer, "--output", out),
            *("--workers", PROCESSES),
        ]
    }
    if megatron:
        ways["megatron"] = lambda text, out: [
            *(sys.executable, megatron / "tools/preprocess_data.py", "--input", text, "--output-prefix", out),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"),
            *("--workers", PROCESSES),
        ]
    ways["datasets"] = lambda text, out: [sys.executable, "-c", DATASETS_MAP, text, tokenizer, out, PROCESSES]
    return ways


def measure(command: list[object], megatron: Path | None) -> Cost:
    """Run it, and look at all its processes meanwhile."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *([megatron] if megatron else [])]))}
    if "preprocess_data.py" in str(command[1]):
        environment["PYTHONPATH"] = str(megatron)
    before, memory = os.times(), 0
    with tempfile.TemporaryFile() as said:
        run = psutil.Popen([str(word) for word in command], stdout=said, stderr=said, env=environment)
        while run.poll() is None:
            with contextlib.suppress(psutil.Error):
                memory = max(memory, sum(_size(process) for process in [run, *run.children(recursive=True)]))
            time.sleep(INTERVAL)
        if run.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(map(str, command))} failed:\n{said.read().decode()}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Cost(after.elapsed - before.elapsed, cpu, memory)


def _size(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it has just ended
        return 0


def compare(folder: Path, rows: dict[str, tuple[Cost, Cost]]) -> None:
    """Stop if the ids are not the same. Megatron reads special tokens in text as such: two sources or so name some."""
    ours = Corpus(folder / "llada-data")
    from datasets import load_from_disk

    theirs = load_from_disk(str(folder / "datasets")).with_format("numpy")["ids"]
    if not np.array_equal(ours.tokens(0, ours.num_tokens), np.concatenate(list(theirs))):
        sys.exit("datasets.map gives other ids")
    if "megatron" in rows:
        other = Corpus(folder / "megatron_text_document")
        same = sum(np.array_equal(ours.document(i), other.document(i)) for i in range(ours.num_documents))
        if ours.num_documents - same > 5:
            sys.exit(f"Megatron gives other ids in {ours.num_documents - same} documents")


def table(rows: dict[str, tuple[Cost, Cost]], tokens: int) -> str:
    lines = [
        "| | tokens/s | llada-data ÷ it | tokens per CPU second | llada-data ÷ it | peak memory | llada-data ÷ it |",
        "|---|---|---|---|---|---|---|",
    ]
    rates = {}
    for way, (one, full) in rows.items():
        rates[way] = tokens / (full.wall - one.wall), tokens / (full.cpu - one.cpu), full.memory
    ours = rates["llada-data"]
    for way, (wall, cpu, memory) in rates.items():
        lines.append(
            f"| {way} | {wall / 1e6:.2f}M | {ours[0] / wall:.1f}× | {cpu / 1e6:.2f}M | {ours[1] / cpu:.1f}× "
            f"| {memory / 2**20:,.0f} MiB | {ours[2] / memory:.2f}× |"
        )
    start = ", ".join(f"{way} {one.wall:.1f} s ({one.cpu:.1f} s CPU)" for way, (one, _) in rows.items())
    return "\n".join([*lines, "", f"Start-up, which is taken off: {start}."])


def megatron_version(checkout: Path) -> str:
    done = subprocess.run(["git", "log", "-1", "--format=%h of %cs"], cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip() or "unknown commit"


if __name__ == "__main__":
    main()
