"""What counting alone achieves on the same held-out tokens; a model has to beat it. All in nats per token."""

import math
from collections.abc import Iterable

import numpy as np


def unigram_entropy(held_out: np.ndarray) -> float:
    """Entropy of the held-out tokens' own frequencies: no model that ignores context does better on them."""
    _, counts = np.unique(held_out, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def bigram_cross_entropy(training: Iterable[np.ndarray], held_out: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of the held-out rows under an add-one (Laplace) bigram model of the training rows.

    p(b | a) = (n(a, b) + 1) / (n(a) + V), n counting neighbours within a row; a row's first token, which has no
    neighbour before it, by the add-one unigram model. Memory holds the counts that the held-out tokens need, and one of
    the arrays of training rows.

    Args:
        training: arrays [n, S] of token ids; their rows together are the training tokens.
        held_out: [M, S] token ids.
        vocab_size: V, the number of different ids.
    """
    wanted, position = np.unique(_pairs(held_out, vocab_size), return_inverse=True)
    pair_counts = np.zeros(len(wanted), np.int64)
    before_counts = np.zeros(vocab_size, np.int64)  # n(a): how often a has a neighbour after it
    token_counts = np.zeros(vocab_size, np.int64)
    for rows in training:
        pairs = _pairs(rows, vocab_size)
        at = np.searchsorted(wanted, pairs)
        at = at[wanted[np.minimum(at, len(wanted) - 1)] == pairs] if len(wanted) else at[:0]
        pair_counts += np.bincount(at, minlength=len(wanted))
        before_counts += np.bincount(rows[:, :-1].ravel(), minlength=vocab_size)
        token_counts += np.bincount(rows.ravel(), minlength=vocab_size)
    p_pair = (pair_counts + 1) / (before_counts[wanted // vocab_size] + vocab_size)
    p_first = (token_counts[held_out[:, 0]] + 1) / (token_counts.sum() + vocab_size)
    return float(-(np.log(p_pair[position]).sum() + np.log(p_first).sum()) / held_out.size)


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Nats per token → bits per byte of the text that the tokens encode; comparable between tokenizers."""
    return nats_per_token * tokens / text_bytes / math.log(2)


def _pairs(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Neighbours (a, b) within each row as the numbers a·V + b. [M, S] → [M·(S−1)] int64."""
    return (rows[:, :-1].astype(np.int64) * vocab_size + rows[:, 1:]).ravel()
