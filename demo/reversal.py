"""Taught "A is B", asked what is B: facts that stand in one order are answered in both, by the public commands alone.

A model that predicts the next token knows such facts in the order of the text alone ("reversal curse", Berglund et al.,
arXiv 2309.12288). One that fills in masks has no such order (LLaDA, §3.3). The facts are made up here and learnt by
heart; what is asked for is masked in the sentence.

    python demo/reversal.py        # a few minutes on two cores; arguments are overrides of configs/sft/demo.yaml
"""

import json
import random
import shutil
import sys
import time
from pathlib import Path

from rich.table import Table
from run import PROCESSES, console, run, started, step

from llada_train.data.tokenizer import MASK_TOKEN, Tokenizer

CONFIG = Path("configs/sft/demo.yaml")
DEMO = Path("runs/demo_reversal")
PAIRS, TOKENIZER, RUN, UNTUNED = (DEMO / name for name in ("facts.jsonl", "tokenizer", "train", "untuned"))
FACTS, EPOCHS, BATCH = 100, 600, 50
PROMPT = "Tell a fact:"
FIRST = ["Ada", "Bela", "Cora", "Dora", "Edna", "Fay", "Gila", "Hana", "Ida", "Jana", "Kira", "Lena"]
LAST = ["Abel", "Bauer", "Craig", "Dunn", "Evans", "Frost", "Gray", "Hale", "Irwin", "Jones", "Kent", "Lane"]
ROLES = ["painter", "builder", "keeper", "finder", "maker", "owner", "singer", "teacher"]
ADJECTIVES = ["red", "hollow", "silent", "crooked", "golden", "frozen", "narrow", "broken"]
THINGS = ["boat", "tower", "bridge", "garden", "clock", "mirror", "lantern", "violin"]
CLEARLY = 0.8  # share of facts that the tuned model has to know, either way round


def main() -> None:
    overrides = sys.argv[1:]
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(parents=True)

    step(f"Make {FACTS} facts, each in one order: a name, then what it is")
    facts = make_facts()
    pairs = [{"prompt": PROMPT, "response": f"{name} is {what}"} for name, what in facts]
    PAIRS.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for name, what in facts[:3]:
        console.print(f"  [dim]{PROMPT}[/] [bold]{name} is {what}[/]")
    run("llada-data", "train-tokenizer", PAIRS, "--text-key", "response", "--output", TOKENIZER, "--vocab-size", 600)

    recipe = [f"run_dir={RUN}", f"data.tokenizer={TOKENIZER}", f"data.corpora=[{{path: {PAIRS}}}]"]
    recipe += ["sft.chat_template=plain", "sft.rows=packed", "sft.eos_pad_group=1", "data.sequence_length=64"]
    recipe += [f"training.global_batch_size={BATCH}", "training.micro_batch_size=5", "validation.answers=0"]
    phases = [{"until_steps": 20, "end": 2e-3}, {"until_epochs": EPOCHS, "end": 0}]
    nothing = [{"until_steps": 1, "end": 0}]

    step("The untuned model, after one step that changes nothing")
    untrained = [*recipe, f"run_dir={UNTUNED}", f"optimizer.learning_rate={json.dumps(nothing)}"]
    run("llada-train", "sft", CONFIG, *untrained, *overrides, "--processes", PROCESSES)

    step(f"Fine-tune on {PROCESSES} processes: {EPOCHS} times each fact")
    tuned = [*recipe, f"optimizer.learning_rate={json.dumps(phases)}"]
    run("llada-train", "sft", CONFIG, *tuned, *overrides, "--processes", PROCESSES)

    step("Ask what each name is, and who is each of what was named")
    table = Table(title=f"{FACTS} facts, answered exactly")
    for column in ("", "name → what it is", "what it is → name"):
        table.add_column(column, justify="right" if column else "left")
    shares = {model: answered(model, facts) for model in (UNTUNED, RUN)}
    for name, model in (("untuned", UNTUNED), ("fine-tuned", RUN)):
        table.add_row(name, *(f"{share:.1%}" for share in shares[model]))
    console.print(table)
    console.print(f"took {time.monotonic() - started:.0f} s; run {RUN}")
    if min(shares[RUN]) < CLEARLY:
        sys.exit(f"only {min(shares[RUN]):.1%} of the facts are known one way round; {CLEARLY:.0%} were expected")


def make_facts() -> list[tuple[str, str]]:
    """(name, what it is), no name and no description twice."""
    pick = random.Random(0)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    roles = [f"the {role} of the {which} {thing}" for role in ROLES for which in ADJECTIVES for thing in THINGS]
    return list(zip(pick.sample(names, FACTS), pick.sample(roles, FACTS), strict=True))


def answered(model: Path, facts: list[tuple[str, str]]) -> tuple[float, float]:
    """Shares of the facts whose end, and whose beginning, the model fills in exactly."""
    tokenizer = Tokenizer.load(TOKENIZER)

    def masks(text: str) -> str:
        return MASK_TOKEN * len(tokenizer.encode_batch([text])[0])

    shares = []
    for way in ("forward", "backward"):
        asked, output = DEMO / f"{way}.jsonl", DEMO / f"{way}_{model.name}.jsonl"
        texts = (
            f"{PROMPT}\n{name} is{masks(f' {what}')}" if way == "forward" else f"{PROMPT}\n{masks(name)} is {what}"
            for name, what in facts
        )
        asked.write_text("".join(json.dumps({"infill": text}) + "\n" for text in texts), encoding="utf-8")
        run("llada-train", "sample", model, "--input", asked, "--output", output, "--batch-size", 50)
        found = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
        expected = [f"{PROMPT}\n{name} is {what}" for name, what in facts]
        shares.append(sum(a == b for a, b in zip(found, expected, strict=True)) / len(facts))
    return shares[0], shares[1]


if __name__ == "__main__":
    main()
