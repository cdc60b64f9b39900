"""Tokens per CPU second of the sampler against a plain loop over the released algorithm, and whether they are the same.

`python benchmarks/sampling.py [--model FOLDER]`: a 6-layer model of random weights, one prompt, on the CPU, with a
small and with LLaDA's vocabulary, greedy and drawn. The loop computes the logits of all positions, and above
temperature 0 fp64 noise for all of them, as generate.py does. For the comparison of drawn tokens it is given the
sampler's noise, in a run of its own that is not timed. With --model, how many tokens the block caches change there, and
what they save.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from common import ROOT, machine_and_versions
from torch import Tensor

sys.path.append(str(ROOT / "tests"))
from released_sampling import plain_loop

from llada_train.convert.load import load_plain
from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.sampling.noise import position_seeds, uniforms
from llada_train.sampling.options import Cache, SamplingOptions
from llada_train.sampling.plain import PlainDenoiser
from llada_train.sampling.sampler import generate

LAYERS, WIDTH, PROMPT, LENGTH, BLOCK = 6, 256, 32, 64, 32
REPEATS = 2


def random_model(vocab_size: int) -> LLaDAModelLM:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=WIDTH,
        n_heads=4,
        n_kv_heads=4,
        n_layers=LAYERS,
        mlp_hidden_size=3 * WIDTH,
        vocab_size=vocab_size,
        mask_token_id=vocab_size - 1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LLaDAModelLM(config).eval()


def our_noise(logits: Tensor, step: int, open_: Tensor) -> Tensor:
    """The sampler's numbers, at the positions of the block."""
    uniform = torch.full(logits.shape, 0.5, dtype=torch.float64)
    columns = open_[0].nonzero()[:, 0]
    uniform[0, columns] = uniforms(position_seeds(0, 0, step, columns - PROMPT), logits.shape[-1])
    return uniform


def seconds(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds of the quickest of some runs, and what it gives."""
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        found = function()
        times.append(time.process_time() - started)
    return min(times), found


def row(vocab_size: int, temperature: float) -> str:
    model, mask = random_model(vocab_size), vocab_size - 1
    prompt = torch.randint(1, mask, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return model(ids).logits

    plain, tokens = seconds(lambda: plain_loop(logits, prompt, LENGTH, LENGTH, BLOCK, mask, temperature))
    if temperature:
        tokens = plain_loop(logits, prompt, LENGTH, LENGTH, BLOCK, mask, temperature, noise=our_noise)
    denoiser = PlainDenoiser(model, vocab_size)
    options = SamplingOptions(LENGTH, BLOCK, temperature, rules="released")
    ours, found = seconds(lambda: generate(denoiser, prompt, LENGTH, options, mask))
    same = int((found == tokens)[:, PROMPT:].sum())
    line = (
        f"| {vocab_size:,} | {temperature:g} | {LENGTH / plain:.1f} | {LENGTH / ours:.1f} | **{plain / ours:.1f}** | "
        f"{same} of {LENGTH} |"
    )
    print(line, flush=True)
    return line


def caches(folder: Path, prompts: int = 8) -> list[str]:
    """How many tokens differ, of texts of the model's own; and the time against that without a cache."""
    model, tokenizer = load_plain(folder)
    denoiser, mask = PlainDenoiser(model, tokenizer.vocab_size), tokenizer.mask_id
    length, block = 64, 32
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, tokenizer.vocab_size - 8, (prompts, 4), generator=generator)
    start[start == mask] = 0
    prompt = generate(denoiser, start, 124, SamplingOptions(16, temperature=0.7), mask)
    found: dict[str, tuple[float, Tensor]] = {}
    names: tuple[Cache, ...] = ("none", "prefix", "dual")
    for name in names:
        options = SamplingOptions(length, block, cache=name)
        started = time.process_time()
        found[name] = (0.0, generate(denoiser, prompt, length, options, mask)[:, prompt.shape[1] :])
        found[name] = (time.process_time() - started, found[name][1])
    exact = found["none"]
    lines = []
    for name in names:
        taken, tokens = found[name]
        same = (tokens == exact[1]).float()
        first = same[:, :block].mean().item()
        lines.append(f"| {name} | {exact[0] / taken:.2f} | {1 - same.mean().item():.1%} | {1 - first:.1%} |")
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", type=Path, help="A trained model, for the caches.")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = [row(vocab_size, temperature) for vocab_size in (4096, 126464) for temperature in (0.0, 1.0)]
    lines = [
        f"# Sampling, {date.today()}",
        "",
        machine_and_versions(),
        f"- {LAYERS} layers, width {WIDTH}, random weights, fp32, one thread; a prompt of {PROMPT} tokens, "
        f"{LENGTH} more in {LENGTH} steps, blocks of {BLOCK}; CPU time, the best of {REPEATS}; "
        "`python benchmarks/sampling.py`",
        f"- load average {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores",
        "",
        "| vocabulary | temperature | plain loop, tokens per CPU second | sampler | ratio | same tokens |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    if given.model:
        lines += [
            "",
            "Block caches are approximate, and off by default. On the demo's model, 8 prompts of 128 tokens, 64 "
            "more, blocks of 32, greedy, one token a step; differences compound, since later tokens read earlier ones:",
            "",
            "| cache | times as fast | tokens that differ | of those of the first block |",
            "|---|---|---|---|",
            *caches(given.model),
        ]
    out = ROOT / "benchmarks" / "results" / f"sampling_{date.today()}.md"
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
