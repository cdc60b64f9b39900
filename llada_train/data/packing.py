"""Which samples share a row. Imports no torch."""

from collections.abc import Sequence

import numpy as np


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: the numbers of the samples in each, every one of them once.

    Longest first, of equal ones the earlier, each goes into the first row that has room for it. Such rows are at most
    11/9·OPT + 6/9, OPT being the fewest (Dósa, "The tight bound of First Fit Decreasing bin-packing algorithm", 2007).

    Raises:
        ValueError: a sample is longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.max(initial=0) > capacity:
        raise ValueError(f"{sizes.max()} tokens do not fit into a row of {capacity}")
    room = np.full(len(sizes), capacity)  # of a row for each sample, the most there can be
    rows: list[list[int]] = []
    for sample in np.argsort(-sizes, kind="stable").tolist():
        row = int(np.argmax(room >= sizes[sample]))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        room[row] -= sizes[sample]
    return rows
