"""`make demo`: from text that every machine has to a model that fills in masks, by the public commands alone.

Arguments go on to `llada-train pretrain` as overrides, for example training.precision=bf16.
"""

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llada_train.config.load import load_config
from llada_train.data.tokenizer import MASK_TOKEN, Tokenizer
from llada_train.parallel.launch import STOPPED_EXIT_CODE

CONFIG = Path("configs/pretrain/demo.yaml")
DEMO = Path("runs/demo")
TEXT, TOKENIZER, RUN, HF = DEMO / "text.jsonl", DEMO / "tokenizer", DEMO / "train", DEMO / "hf"
PROCESSES = 2
COMMANDS = Path(sys.executable).parent
CLEARLY = 0.5  # nats per token that the model has to be better than the unigram entropy
LOAD_WITH_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("import os", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
print(f"{type(model).__name__}: {model.num_parameters():,} parameters, logits {tuple(logits.shape)}")
"""

console = Console(highlight=False)
started = time.monotonic()


def main() -> None:
    overrides = sys.argv[1:]
    config = load_config(CONFIG, overrides)
    held_out_documents = config.data.corpora[0].validation_documents
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(parents=True)

    step("Collect text: the Python standard library's own sources")
    texts = collect(Path(sysconfig.get_path("stdlib")))
    size = sum(len(text.encode()) for text in texts)
    console.print(f"{len(texts):,} files, {size / 1e6:.1f} MB → {TEXT}; the last {held_out_documents} are held out")

    step("Train a tokenizer")
    run("llada-data", "train-tokenizer", TEXT, "--output", TOKENIZER, "--vocab-size", config.model.vocab_size)

    step("Tokenize into a corpus")
    run("llada-data", "tokenize", TEXT, "--tokenizer", TOKENIZER, "--output", DEMO / "corpus")

    step(f"Pre-train on {PROCESSES} processes, and stop the run halfway with SIGTERM")
    command = ["llada-train", "pretrain", CONFIG, *overrides, "--processes", PROCESSES]
    half = config.optimizer.learning_rate[-1].until_tokens // 2
    stop_halfway(command, half)

    step("The same command again: the run resumes by itself")
    run(*command)

    step("Export to Hugging Face format, and load it with plain transformers in a fresh process")
    run("llada-train", "convert", "to-hf", RUN, HF)
    subprocess.run([sys.executable, "-c", LOAD_WITH_TRANSFORMERS, HF], check=True)

    step("Fill in a masked piece of held-out code, by low-confidence remasking")
    before, hidden, after = held_out_piece(texts[-held_out_documents:])
    masks = len(Tokenizer.load(TOKENIZER).encode_batch([hidden])[0])
    masked = f"{before}{MASK_TOKEN * masks}{after}"
    filled = run("llada-train", "sample", HF, "--infill", masked, show=f"--infill '… {masks} masks …'")
    console.print(f"[dim]{escape(before)}[/][bold yellow]{escape(hidden)}[/][dim]{escape(after)}[/]")
    console.rule("filled in by the model", style="dim")
    found = filled[len(before) : len(filled) - len(after)]
    console.print(f"[dim]{escape(before)}[/][bold green]{escape(found)}[/][dim]{escape(after)}[/]")

    step("Measure it on the held-out documents")
    report = json.loads(run("llada-train", "evaluate", RUN, "--json"))
    summary(report)
    gain = report["unigram"]["nats_per_token"] - report["bound"]["nats_per_token"]
    if gain < CLEARLY:
        sys.exit(f"the model is only {gain:.2f} nats per token better than the unigram entropy; {CLEARLY} was expected")


def step(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/]  [dim]{time.monotonic() - started:.0f} s[/]", align="left")


def run(program: str, *arguments: object, show: str | None = None) -> str:
    """Run one of the project's commands, shown as a user would type it; returns what it printed, if that is `show`n."""
    words = [str(argument) for argument in arguments]
    typed = " ".join([program, words[0], words[1], show]) if show else shlex.join([program, *words])
    console.print(f"[bold cyan]$ {escape(typed)}[/]", soft_wrap=True)
    captured = program == "llada-train" and words[0] in ("sample", "evaluate")
    done = subprocess.run(
        [COMMANDS / program, *words], check=False, stdout=subprocess.PIPE if captured else None, text=True
    )
    if done.returncode:
        sys.exit(f"{program} {words[0]} failed with exit code {done.returncode}")
    return (done.stdout or "").removesuffix("\n")


def collect(library: Path) -> list[str]:
    """The library's sources in an order that depends on nothing but their names, so that the tail is a fair sample."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "__pycache__"}
    files = [path for path in library.rglob("*.py") if not left_out & set(path.relative_to(library).parts)]
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(library).as_posix().encode()).digest())
    texts = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            texts.append(text)
    TEXT.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


def stop_halfway(command: list[object], tokens: int) -> None:
    """Start the command, send it SIGTERM once its log has passed `tokens`, and see that it ends as documented."""
    words = [str(word) for word in command]
    console.print(f"[bold cyan]$ {escape(shlex.join(words))}[/]", soft_wrap=True)
    process = subprocess.Popen([COMMANDS / words[0], *words[1:]])
    while process.poll() is None and logged_tokens() < tokens:
        time.sleep(0.2)
    if process.poll() is not None:
        sys.exit(f"pretrain ended before half of the tokens were done, with exit code {process.returncode}")
    console.print(f"[bold magenta]half of the tokens are done: sending SIGTERM to process {process.pid}[/]")
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != STOPPED_EXIT_CODE:
        sys.exit(f"pretrain ended with exit code {code} instead of {STOPPED_EXIT_CODE}")
    console.print(f"[bold magenta]exit code {code}: a checkpoint is saved[/]")


def logged_tokens() -> int:
    log = RUN / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["tokens"] for line in lines[:-1]), default=0)


def held_out_piece(texts: list[str]) -> tuple[str, str, str]:
    """The first method of the held-out code: (what stands before, what is to be hidden, what stands behind)."""
    for text in texts:
        found = re.search(r"(    def \w+)(\(self)(\):\n(?:        .*self\..+\n){2,5})", text)
        if found:
            return found[1], found[2], found[3]
    sys.exit("no method in the held-out code")


def summary(report: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"{report['tokens']:,} held-out tokens, {report['text_bytes']:,} bytes")
    for column in ("", "nats per token", "bits per byte"):
        table.add_column(column, justify="right" if column else "left")
    for name, key in (("LLaDA, upper bound", "bound"), ("add-one bigram", "bigram"), ("unigram entropy", "unigram")):
        table.add_row(name, f"{report[key]['nats_per_token']:.3f}", f"{report[key]['bits_per_byte']:.3f}")
    console.print(table)
    places = {
        "run": RUN,
        "TensorBoard": f"tensorboard --logdir {RUN / 'tensorboard'}",
        "loss curves": RUN / "loss_curves.png",
        "Hugging Face folder": HF,
    }
    for name, place in places.items():
        console.print(f"{name:>20}  [bold]{place}[/]")
    console.print(f"{'took':>20}  {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
