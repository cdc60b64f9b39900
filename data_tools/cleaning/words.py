"""Text → words → hashed n-grams, vectorised: what every cleaning command compares.

Scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) count each character as a word.
Hashes have 64 bits; the same text has the same hashes on any machine.
"""

import re
import unicodedata

import numpy as np
from rensa import RMinHash

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
)
_SPACED_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_BARE_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost


def split_words(text: str) -> list[str]:
    """The words between spaces, punctuation included."""
    return _SPACED_WORD.findall(text)


def bare_words(text: str) -> list[str]:
    """The words without punctuation, in lower case and Unicode's compatibility form: for finding copies."""
    return _BARE_WORD.findall(unicodedata.normalize("NFKC", text).lower())


def hash_words(words: list[str]) -> np.ndarray:
    """uint64[number of words]."""
    [hashes] = RMinHash.hash_token_sets([words])
    return np.array(hashes, dtype=np.uint64)


def hash_ngrams(word_hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64[words − n + 1], one hash for each run of `n` words; empty if there are fewer words."""
    count = max(len(word_hashes) - n + 1, 0)
    mixed = mix(word_hashes)
    total = mixed[:count]
    for i in range(1, n):
        total = total * _MULTIPLIER + mixed[i : i + count]
    return mix(total)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit over all bits: the finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
