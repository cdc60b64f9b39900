"""MinHash signatures in bands (Broder, 1997; Leskovec et al., Mining of Massive Datasets, section 3.4).

A document is the set of its runs of `ngram` words. Two documents whose sets have Jaccard similarity s agree in one
slot of a signature with probability s, in all `rows` slots of one band with s^rows, and in at least one of `bands`
bands with 1 − (1 − s^rows)^bands. Documents that agree in a band are near duplicates.
"""

import hashlib
import unicodedata
from dataclasses import dataclass

import numpy as np
from rensa import RMinHash

from data_tools.cleaning.words import bare_words, hash_ngrams, hash_words, mix

SEED = 1


@dataclass(frozen=True)
class Signer:
    """Texts → keys; equal keys in a column mean duplicates.

    Column 0 is the hash of the text in Unicode's form NFC with all white space equal, the others are the bands. 0 is no
    key: a document of fewer than `ngram` words has no bands.
    """

    ngram: int
    bands: int  # 0: exact duplicates only
    rows: int

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """One row uint64[1 + bands] for each text."""
        keys = np.zeros((len(texts), 1 + self.bands), dtype=np.uint64)
        keys[:, 0] = [_exact_key(text) for text in texts]
        if self.bands:
            ngrams = [self.ngrams(text) for text in texts]
            signed = [i for i, row in enumerate(ngrams) if len(row)]
            if signed:
                keys[signed, 1:] = self._band_keys([ngrams[i] for i in signed])
        return list(keys)

    def ngrams(self, text: str) -> np.ndarray:
        """The hashes of all runs of `ngram` words, repeated ones included."""
        return hash_ngrams(hash_words(bare_words(text)), self.ngram)

    def _band_keys(self, ngrams: list[np.ndarray]) -> np.ndarray:
        ends = np.cumsum([0, *map(len, ngrams)]).astype(np.uint64)
        slots = self.bands * self.rows
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(ngrams), ends, slots, SEED)
        signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(ngrams), self.bands, self.rows)
        keys = np.zeros(signatures.shape[:2], dtype=np.uint64)
        for row in range(self.rows):
            keys = mix(keys + signatures[:, :, row] + np.uint64(1))
        return np.maximum(keys, 1)

    def probability(self, similarity: float) -> float:
        """The probability that two documents of Jaccard similarity `similarity` are found."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def _exact_key(text: str) -> int:
    same = " ".join(unicodedata.normalize("NFC", text).split())
    return int.from_bytes(hashlib.blake2b(same.encode("utf-8"), digest_size=8).digest(), "little") or 1
