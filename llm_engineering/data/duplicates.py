"""Finds near duplicates with MinHash and locality-sensitive hashing (Broder 1997), by the library datasketch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from datasketch import MinHash, MinHashLSH

SHINGLE_WORDS = 3
# 128 permutations estimate a Jaccard similarity to about ±0.09; every candidate is then checked exactly.
PERMUTATIONS = 128


class NearDuplicates:
    """Texts added so far, and which of them a new text nearly repeats.

    Args:
        threshold: Jaccard similarity of the sets of three-word shingles, from which two texts count as the same.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.shingles: dict[str, frozenset[str]] = {}

    def find(self, text: str) -> str | None:
        """The key of the most similar text at or above the threshold, or None."""
        shingles = _shingles(text)
        scored = [(_jaccard(shingles, self.shingles[key]), key) for key in self.index.query(_minhash(shingles))]
        best = max(scored, default=(0.0, ""))
        return best[1] if best[0] >= self.threshold else None

    def add(self, key: str, text: str) -> None:
        """Add a text under a key that was not used before."""
        shingles = _shingles(text)
        self.shingles[key] = shingles
        self.index.insert(key, _minhash(shingles))


def normalised(text: str) -> str:
    """The words of a text, without case, punctuation and space."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _shingles(text: str) -> frozenset[str]:
    words = normalised(text).split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count))


def _minhash(shingles: Iterable[str]) -> MinHash:
    sketch = MinHash(num_perm=PERMUTATIONS)
    sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return sketch


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
