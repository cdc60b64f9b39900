"""`make demo-sft`: from pairs that every machine has to a model that answers, by the public commands alone.

Arguments go on to `llada-train sft` as overrides, for example training.precision=bf16.
"""

import json
import shutil
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from pairs import QUESTIONS, pairs
from rich.table import Table
from run import PROCESSES, console, run, started, step

from llada_train.config.load import load_config

CONFIG = Path("configs/sft/demo.yaml")
DEMO = Path("runs/demo_sft")
PAIRS, TOKENIZER, RUN, UNTUNED, HF = (DEMO / name for name in ("pairs.jsonl", "tokenizer", "train", "untuned", "hf"))
CLEARLY = 0.1  # share of answers by which the model has to be better than the commonest answers


def main() -> None:
    overrides = sys.argv[1:]
    config = load_config(CONFIG, overrides)
    held_out = config.data.corpora[0].validation_documents
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(parents=True)

    step("Make pairs: questions about the functions of the Python standard library, and their answers")
    found = pairs()
    PAIRS.write_text("".join(json.dumps(pair) + "\n" for pair in found), encoding="utf-8")
    console.print(f"{len(found):,} pairs → {PAIRS}; the last {held_out} are held out, such as")
    for pair in found[-3:]:
        console.print(f"  [dim]{pair['prompt']}[/] [bold]{pair['response']}[/]")

    step("Train a tokenizer, with the tokens of LLaDA's chat format")
    size = ["--vocab-size", config.model.vocab_size]
    run("llada-data", "train-tokenizer", PAIRS, "--text-key", "prompt", "--output", TOKENIZER, *size)

    step("Ask the untuned model, after one step that changes nothing")
    nothing = ["optimizer.learning_rate=[{until_steps: 1, end: 0}]", f"run_dir={UNTUNED}"]
    run("llada-train", "sft", CONFIG, *overrides, *nothing, "--processes", PROCESSES)
    before = json.loads(run("llada-train", "evaluate", UNTUNED, "--json"))

    step(f"Fine-tune on {PROCESSES} processes")
    run("llada-train", "sft", CONFIG, *overrides, "--processes", PROCESSES)

    step("Export to Hugging Face format, chat template included")
    run("llada-train", "convert", "to-hf", RUN, HF)

    step("Ask the tuned one")
    after = json.loads(run("llada-train", "evaluate", RUN, "--json"))
    for prompt, response, answer in after["samples"]:
        question = prompt.removeprefix("user").removesuffix("assistant\n\n").strip()
        console.print(f"  [dim]{question}[/] [bold]{answer}[/]{'' if answer == response else f' (it is {response})'}")
    guessed = commonest(found[:-held_out], found[-held_out:])
    table = Table(title=f"{after['examples']} held-out questions")
    for column in ("", "exact answers", "bound, nats per token"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("untuned", f"{before['exact_matches'] / before['examples']:.1%}", f"{before['bound']:.3f}")
    table.add_row("commonest answer to each question", f"{guessed:.1%}", "")
    exact = after["exact_matches"] / after["examples"]
    table.add_row("fine-tuned", f"{exact:.1%}", f"{after['bound']:.3f}")
    console.print(table)
    console.print(f"took {time.monotonic() - started:.0f} s; run {RUN}, Hugging Face folder {HF}")
    if exact < guessed + CLEARLY:
        sys.exit(f"{exact:.1%} of the answers are exact, where always the commonest ones would give {guessed:.1%}")


def commonest(trained: list[dict[str, str]], asked: list[dict[str, str]]) -> float:
    """The share of answers that are right if each question always gets its commonest answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in trained:
        answers[question_of(pair)][pair["response"]] += 1
    return sum(pair["response"] == answers[question_of(pair)].most_common(1)[0][0] for pair in asked) / len(asked)


def question_of(pair: dict[str, str]) -> str:
    return next(question for question in QUESTIONS if pair["prompt"].startswith(question))


if __name__ == "__main__":
    main()
