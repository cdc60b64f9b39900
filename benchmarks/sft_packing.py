"""Packed rows of fine-tuning against padded ones: the same examples and noise, step by step in turn, one process.

Lengths are log-normal, as those of dialogues are: many short ones, few very long. The learning rate is 0, so that both
work with the same weights all the time; it stops if they do not lose the same.

    python benchmarks/sft_packing.py            # table, and benchmarks/results/sft_packing_DATE.md
    python benchmarks/sft_packing.py --no-write
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

from common import ROOT, machine_and_versions, make_data

SEQUENCE_LENGTH = 512
GLOBAL_BATCH_SIZE = 64
PROMPT, RESPONSE = (20, 0.8), (50, 1.1)  # median and σ of the logarithm, in words
STEPS = 4
KINDS = ("padded", "packed")
SETTINGS = ((2, 2), (8, 2), (8, 1))  # micro_batch_size, eos_pad_group
LOSS_TOLERANCE = 1e-4


class Step(NamedTuple):
    seconds: float  # of CPU time, of one thread, which other programs on the machine hardly change
    micro_batches: int
    columns: int  # of all rows, whatever is in them
    read: int  # tokens of examples with their learnt EOS
    learnt: int  # of those, responses and EOS
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed rows of fine-tuning against padded ones.")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        write_pairs(Path(folder) / "pairs.jsonl")
        found = measure(Path(folder))
    report = table(found)
    print(report)
    if not arguments.no_write:
        path = ROOT / f"benchmarks/results/sft_packing_{date.today().isoformat()}.md"
        header = f"# Packed and padded rows of fine-tuning, {date.today().isoformat()}\n\n{machine_and_versions()}\n"
        how = (
            f"- one process, CPU time of its one thread, fp32, the demo's model; rows of at most "
            f"{SEQUENCE_LENGTH} tokens, "
            f"{GLOBAL_BATCH_SIZE} examples in a batch, median of {STEPS} steps; `python benchmarks/sft_packing.py`\n"
        )
        path.write_text(f"{header}{how}\n{report}\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def write_pairs(path: Path) -> None:
    pick = random.Random(0)

    def words(median: int, sigma: float) -> str:
        count = max(1, round(pick.lognormvariate(math.log(median), sigma)))
        return " ".join(pick.choices(("self", "return", "if", "import", "name", "for", "in", "not"), k=count))

    pairs = ({"prompt": words(*PROMPT), "response": words(*RESPONSE)} for _ in range(GLOBAL_BATCH_SIZE * (STEPS + 1)))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def measure(folder: Path) -> dict[tuple[int, int, str], list[Step]]:
    from llada_train.parallel import topology

    topology.quiet_engines()
    from llada_train.config.load import load_config
    from llada_train.data.loader import TrainingLoader
    from llada_train.data.sft import SftData
    from llada_train.model.weights import InitialWeights
    from llada_train.parallel.engine import Engine

    overrides = [
        f"run_dir={folder / 'run'}",
        f"data.tokenizer={folder / 'tokenizer'}",
        f"data.corpora=[{{path: {folder / 'pairs.jsonl'}}}]",
        f"data.sequence_length={SEQUENCE_LENGTH}",
        f"model.max_sequence_length={SEQUENCE_LENGTH}",
        f"training.global_batch_size={GLOBAL_BATCH_SIZE}",
        f"optimizer.learning_rate=[{{until_steps: {STEPS + 1}, end: 0}}]",
        "validation.answers=0",
    ]
    first = load_config(ROOT / "configs/sft/demo.yaml", overrides)
    here = topology.initialize(first.parallel)
    engine = Engine(first, here)
    initial = InitialWeights(first.model, first.seed)
    engine.set_weights(lambda shard: shard.of(initial.read(shard.name)))
    found: dict[tuple[int, int, str], list[Step]] = {}
    for size, group in SETTINGS:
        loaders = []
        for kind in KINDS:
            settings = [f"training.micro_batch_size={size}", f"sft.eos_pad_group={group}", f"sft.rows={kind}"]
            config = load_config(ROOT / "configs/sft/demo.yaml", [*overrides, *settings])
            loaders.append((kind, data := SftData(config), TrainingLoader(data, config, here.place)))
        for step, (kind, data, loader) in itertools.product(range(STEPS + 1), loaders):
            number = step * GLOBAL_BATCH_SIZE
            batches = loader.global_batch(number)
            samples = data.samples(number, range(number, number + GLOBAL_BATCH_SIZE))
            read = sum(len(sample.tokens) for sample in samples)
            # A weight is 1/(p·L'·N).
            learnt = sum(1 / (one.loss_weight * one.mask_probability * GLOBAL_BATCH_SIZE) for one in samples)
            began = time.process_time()
            done = engine.train_step(batches, learning_rate=0.0)
            seconds = time.process_time() - began
            columns = sum(batch.input_ids.numel() for batch in batches)
            measured = Step(seconds, len(batches), columns, read, round(learnt), done.losses.loss)
            if step:  # the first one also allocates
                found.setdefault((size, group, kind), []).append(measured)
        for padded, packed in zip(*(found[size, group, kind] for kind in KINDS), strict=True):
            if abs(packed.loss / padded.loss - 1) > LOSS_TOLERANCE:
                sys.exit(f"packed rows lose {packed.loss}, padded ones {padded.loss}")
    topology.shutdown()
    return found


def table(found: dict[tuple[int, int, str], list[Step]]) -> str:
    titles = ["micro-batch", "EOS of", "rows", "micro-batches", "columns filled", "s/step", "tokens learnt/s", "speed"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for (size, group, kind), steps in found.items():
        padded = found[size, group, KINDS[0]]
        seconds = statistics.median(step.seconds for step in steps)
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(padded, steps, strict=True))
        cells = [
            f"{size} rows",
            f"{group}",
            kind,
            f"{statistics.mean(step.micro_batches for step in steps):.1f}",
            f"{sum(step.read for step in steps) / sum(step.columns for step in steps):.0%}",
            f"{seconds:.2f}",
            f"{statistics.median(step.learnt / step.seconds for step in steps):,.0f}",
            f"{ratio:.2f} ×",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
