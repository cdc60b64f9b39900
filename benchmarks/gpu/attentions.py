"""Attention alone, over what a row holds: one long segment, short rows, documents that do not see each other."""

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import Ceilings, Plot, Row, Section, Sizes, gib, peak_memory, row, seconds
from llada_train.data.batch import Segments
from llada_train.model import attention
from llada_train.model.attention import AttentionInputs, BidirectionalAttention
from llada_train.model.kernels import Kernels


def attentions(sizes: Sizes, ceiling: Ceilings) -> Section:
    config = sizes.config()
    S, B, model = config.data.sequence_length, sizes.micro_batches[-1], config.model
    N, D = model.num_heads, model.head_dim
    generator = torch.Generator(sizes.device).manual_seed(0)
    inputs = [
        torch.randn(S, B, N, D, generator=generator, device=sizes.device, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    cotangent = torch.randn(S, B, N * D, generator=generator, device=sizes.device, dtype=torch.bfloat16)
    rows: list[Row] = []
    for what, lengths in _segmentations(S, B).items():
        segments = _segments(lengths, sizes.device)
        flops = 14 * N * D * sum(n * n for n in lengths)
        sides = {f"ours ({_kind(sizes)})": _ours(segments if len(lengths) > B else None)}
        sides["SDPA, whole rows" if len(lengths) == B else "SDPA, dense mask"] = _torchs(
            None if len(lengths) == B else _visible(lengths, S, B, sizes.device)
        )
        for side, function in sides.items():

            def measure(function: Callable[..., Tensor] = function, flops: float = flops) -> Row:
                def step() -> None:
                    torch.autograd.grad(function(*inputs), inputs, cotangent)

                with peak_memory(sizes) as peak:
                    step()
                took = seconds(step, sizes)
                told = {"TFLOP/s": flops / took / 1e12, "of a large product": flops / took / ceiling.flops}
                return {"ms": took * 1e3, **told, "peak GiB": gib(peak.beyond)}

            mean = sum(lengths) / len(lengths)
            rows.append(row({"attention": side, "rows": what, "mean segment": mean}, measure, sizes))
    return Section(
        "Attention",
        f"{B} rows of {S:,} tokens, {N} heads of {D}, bf16, forward and backward, without rotary embeddings. FLOPs: "
        "14·n²·N·D of each segment of n tokens (4 forward; 10 backward, which makes the scores again), so work that a "
        "dense mask throws away counts for nothing.",
        rows=rows,
        plot=Plot(x="mean segment", y="TFLOP/s", lines="attention", log_x=True),
    )


def _kind(sizes: Sizes) -> str:
    return "torch SDPA" if attention.flash_attn_varlen_func is None or sizes.tiny else "flash-attn"


def _segmentations(S: int, B: int) -> dict[str, list[int]]:
    """Lengths of the segments of B rows one after another."""
    generator = torch.Generator().manual_seed(1)

    def documents(mean: int) -> list[int]:
        lengths: list[int] = []
        for _ in range(B):
            left = S
            while left:
                drawn = int(torch.empty(()).exponential_(1 / mean, generator=generator)) + 1
                lengths.append(min(left, drawn))
                left -= lengths[-1]
        return lengths

    cut = [S // 3, S - S // 3, *[S] * (B - 1)]
    found = {"whole": [S] * B, "one of them cut": cut}
    found |= {f"equal parts of 1/{parts}": [S // parts] * (parts * B) for parts in (4, 16)}
    return found | {f"documents of {mean} on average": documents(mean) for mean in (S // 4, S // 16)}


def _segments(lengths: list[int], device: torch.device) -> Segments:
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Segments(borders, borders, tuple((n, n) for n in lengths))


def _ours(segments: Segments | None) -> Callable[..., Tensor]:
    """The module that a layer holds, but for the rotation."""
    unturned = Kernels(rms_norm=F.rms_norm, rotate=lambda q, k, cos, sin: (q, k), swiglu=F.silu)
    core = BidirectionalAttention(None, unturned)  # type: ignore[arg-type]
    nothing = torch.empty(0)
    inputs = AttentionInputs(cos=nothing, sin=nothing, segments=segments)
    return lambda q, k, v: core(q, k, v, packed_seq_params=inputs)


def _torchs(visible: Tensor | None) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, attn_mask=visible).permute(2, 0, 1, 3).flatten(2)

    return function


def _visible(lengths: list[int], S: int, B: int, device: torch.device) -> Tensor:
    """[B, 1, S, S]: whether two tokens are of one segment."""
    segment = torch.repeat_interleave(torch.tensor(lengths, device=device)).view(B, 1, S)
    return segment.unsqueeze(-1) == segment.unsqueeze(-2)
