"""How often greedy infilling gives back what was there: spans of a text, and one half of a pair from the other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llada_train.data.tokenizer import Tokenizer
from llada_train.objective.keyed import Purpose, sample_words, uniform
from llada_train.sampling.denoiser import Denoiser
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import fill_rows

SPAN_LENGTHS = (1, 2, 4, 8, 16)
_ROW = 256
_MOST_ROWS = 200
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Accuracy:
    what: str
    cases: int
    exact: float
    """The fraction of cases that came back whole."""
    standard_error: float
    tokens: float
    """The fraction of tokens that came back."""


def span_accuracy(
    denoiser: Denoiser,
    ids: Sequence[int],
    tokenizer: Tokenizer,
    max_sequence_length: int,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Accuracy]:
    """For each length, a span at a keyed place in each row of the text is masked and filled in, a token a step.

    Rows have 256 tokens, or what the model or the text allows; 200 of them, spread over the text, are enough.
    """
    length = min(_ROW, max_sequence_length, len(ids))
    starts = range(0, len(ids) - length + 1, length)
    rows = [list(ids[start : start + length]) for start in starts[:: -(-len(starts) // _MOST_ROWS)]]
    found = []
    lengths = [span for span in SPAN_LENGTHS if span < length]
    for number, span in enumerate(lengths):
        places = uniform(sample_words(seed, Purpose.SAMPLING_ORDER, number * _MOST_ROWS, len(rows))[:, 0])
        cases = [(row, int(place * (length - span + 1)), span) for row, place in zip(rows, places, strict=True)]
        filled = _refill(denoiser, cases, tokenizer.mask_id, batch_size)
        found.append(_accuracy(f"span of {span}", cases, filled))
        on_progress(number + 1, len(lengths))
    return found


def reversal_accuracy(
    denoiser: Denoiser,
    pairs: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    batch_size: int = 8,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Accuracy]:
    """The second text of each pair after the first, and the first one before the second, a token a step.

    The number of masks is that of the missing text's tokens; the released protocol asks in words instead, and compares
    substrings.
    """
    encoded = [tokenizer.encode_batch(pair) for pair in pairs]
    found = []
    for what, is_second in (("second from first", True), ("first from second", False)):
        cases = [([*a, *b], len(a) if is_second else 0, len(b) if is_second else len(a)) for a, b in encoded]
        filled = _refill(denoiser, cases, tokenizer.mask_id, batch_size)
        found.append(_accuracy(what, cases, filled))
        on_progress(len(found), 2)
    return found


_Case = tuple[list[int], int, int]
"""A row, and where in it how many tokens are missing."""


def _refill(denoiser: Denoiser, cases: Sequence[_Case], mask_id: int, batch_size: int) -> list[list[int]]:
    rows = [[*row[:start], *[mask_id] * length, *row[start + length :]] for row, start, length in cases]
    return fill_rows(denoiser, rows, SamplingOptions(), mask_id, batch_size)


def _accuracy(what: str, cases: Sequence[_Case], filled: Sequence[list[int]]) -> Accuracy:
    right = [
        [a == b for a, b in zip(row[start : start + length], out[start : start + length], strict=True)]
        for (row, start, length), out in zip(cases, filled, strict=True)
    ]
    exact = sum(all(one) for one in right) / len(cases)
    error = math.sqrt(exact * (1 - exact) / len(cases))
    return Accuracy(what, len(cases), exact, error, sum(map(sum, right)) / sum(map(len, right)))
