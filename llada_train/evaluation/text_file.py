"""The bound on a text of the user's, in bits per byte, and by t what it is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import Tokenizer
from llada_train.evaluation.baselines import bits_per_byte
from llada_train.evaluation.bound import variational_bound
from llada_train.objective.forward_process import validation_noise
from llada_train.sampling.denoiser import Denoiser

BUCKETS = 10
_LEAST_ROWS = 100  # a short text is measured under so much noise, at least


@dataclass(frozen=True)
class Bucket:
    """Noise with t in [t_from, t_to)."""

    t_from: float
    t_to: float
    bits_per_byte: float
    """What masked tokens cost there, were all of the text masked tokens of this noise; the mean of all is the bound."""
    standard_error: float
    draws: int


@dataclass(frozen=True)
class TextReport:
    tokens: int
    text_bytes: int
    left_over: int
    """Tokens after the last whole row, which are not measured."""
    bits_per_byte: float
    standard_error: float
    buckets: list[Bucket]


def text_report(
    denoiser: Denoiser,
    path: Path,
    tokenizer: Tokenizer,
    max_sequence_length: int,
    batch_size: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextReport:
    """Cut into rows as long as the model reads; what is left after the last whole one is not measured.

    Raises:
        UserError: the text cannot be read, or is empty.
    """
    ids = text_ids(path, tokenizer)
    S = min(max_sequence_length, len(ids))
    rows = np.array(ids[: len(ids) // S * S]).reshape(-1, S)
    text_bytes = sum(len(tokenizer.decode(row.tolist()).encode()) for row in rows)
    repeats = -(-_LEAST_ROWS // len(rows))
    noise = validation_noise(seed, [repeats * len(rows)], S, epsilon=1e-3)
    bound = variational_bound(
        denoiser, np.tile(rows, (repeats, 1)), noise, tokenizer.mask_id, batch_size=batch_size, on_progress=on_progress
    )

    def bits(nats_per_token: float) -> float:
        return bits_per_byte(nats_per_token, rows.size, text_bytes)

    buckets = []
    bucket_of = np.minimum((noise.mask_probability * BUCKETS).astype(int), BUCKETS - 1)
    for bucket in range(BUCKETS):
        values = bound.rows[bucket_of == bucket]
        error = bits(float(values.std(ddof=1))) / np.sqrt(len(values))
        value = bits(float(values.mean()))
        buckets.append(Bucket(bucket / BUCKETS, (bucket + 1) / BUCKETS, value, float(error), len(values)))
    return TextReport(
        rows.size, text_bytes, len(ids) - rows.size, bits(bound.mean), bits(bound.standard_error), buckets
    )


def text_ids(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Raises UserError: the text cannot be read, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    ids = tokenizer.encode_batch([text])[0]
    if not ids:
        raise UserError(f"{path}: empty; give some text to measure on")
    return ids


def draw(report: TextReport, path: Path) -> None:
    """The curve over t, as PNG.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    middles = [(bucket.t_from + bucket.t_to) / 2 for bucket in report.buckets]
    axes.errorbar(
        middles,
        [b.bits_per_byte for b in report.buckets],
        [b.standard_error for b in report.buckets],
        fmt="o-",
        capsize=3,
    )
    axes.axhline(report.bits_per_byte, linestyle="--", color="grey", label=f"bound {report.bits_per_byte:.3f}")
    axes.set(xlabel="t, the chance of each token to be masked", ylabel="bits per byte", xlim=(0, 1))
    axes.legend()
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
