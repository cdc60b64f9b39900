"""The head: logits of all tokens, of masked ones, and of these in pieces, over the share of masked tokens."""

import torch
from head import SHARES, SIDES, different, prepared

from benchmarks.gpu.measure import Ceilings, Plot, Row, Section, Sizes, gib, peak_memory, row, seconds


def heads(sizes: Sizes, ceiling: Ceilings) -> Section:
    """Of one micro-batch, forward and backward. Sides that compute other losses or gradients are a problem."""
    config = sizes.config()
    tokens, model = sizes.micro_batches[-1] * config.data.sequence_length, config.model
    rows: list[Row] = []
    problems: list[str] = []
    for share in SHARES[::2] if sizes.tiny else SHARES:
        found: dict[str, dict[str, float]] = {}
        for side in SIDES:

            def measure(side: str = side, share: float = share, found: dict[str, dict[str, float]] = found) -> Row:
                step = prepared(
                    side, share, tokens, model.hidden_size, model.padded_vocab_size, torch.bfloat16, sizes.device
                )
                with peak_memory(sizes) as peak:
                    found[side] = step()
                took = seconds(lambda: step(norms=False), sizes, warmup=1)
                products = 6 * tokens * model.hidden_size * model.padded_vocab_size
                products *= 1.0 if SIDES[side] is None else share
                return {
                    "ms": took * 1e3,
                    "peak GiB": gib(peak.beyond),
                    "products' TFLOP/s": products / took / 1e12,
                    "of a large product": products / took / ceiling.flops,
                }

            rows.append(row({"head": side, "masked %": 100 * share}, measure, sizes))
        for side in set(found) - {"all tokens"}:
            if "all tokens" in found and (told := different(found["all tokens"], found[side], "bf16")) is not None:
                problems.append(f"{side}, {share:.0%} masked: {told}")
    return Section(
        "The head",
        f"{tokens:,} tokens, hidden size {model.hidden_size:,}, vocabulary {model.padded_vocab_size:,}, bf16; forward "
        "and backward. Memory beyond hidden states and weights. Products: 6·K·H·V FLOPs of the K positions whose "
        "logits are made; in pieces they are made twice, which is not counted. All sides lose the same (2e-2).",
        rows=rows,
        plot=Plot(x="masked %", y="ms", lines="head"),
        problems=problems,
    )
