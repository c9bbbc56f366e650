"""Finds texts that occur twice: near duplicates within a dataset, and training rows that occur in evaluation files.

Near duplicates: MinHash and locality-sensitive hashing (Broder 1997), computed by the library rensa, compare texts as
sets of three-word shingles. Each text's MinHash is cut into bands. Texts that share a band are candidates, and every
candidate pair is checked by its exact Jaccard similarity. Band hashes and shingle hashes are in files, so that memory
does not grow with the number of texts.

Contamination: a row shares consecutive words with an evaluation file (Brown et al. 2020, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from llm_engineering.data.rows import Message, Row, normalised, words

SHINGLE_WORDS = 3
PERMUTATIONS = 128
_SEED = 1
# Share of the pairs exactly at the threshold that must become candidates.
_RECALL = 0.999
# Rows to sort at a time: 32 MB of hashes and row numbers.
_PART_ROWS = 2**21
# In a group of candidates, a text is compared with at most this many texts that differ from each other. Without a
# bound, a thousand rows of one template would take a million comparisons.
_MAX_LEADERS = 8


class Sketches(NamedTuple):
    """Hashes of n texts by which near duplicates are found.

    Attributes:
        bands: hashes of the bands of each MinHash, shape (n, bands).
        shingles: hashes of the distinct shingles of the first text, then of the second, and so on.
        counts: distinct shingles of each text, shape (n,).
    """

    bands: NDArray[np.uint64]
    shingles: NDArray[np.uint64]
    counts: NDArray[np.uint32]


def band_count(threshold: float) -> int:
    """The smallest number of bands that find a pair at the threshold with a probability of 0.999.

    A pair of similarity s shares one of b bands of r values with probability 1 - (1 - s^r)^b
    (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4).
    """
    for rows in range(PERMUTATIONS // 4, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands
    return PERMUTATIONS


def sketch(texts: Sequence[str], threshold: float) -> Sketches:
    """Compute the hashes by which texts with at least this Jaccard similarity are found."""
    # rensa's type stubs call the result a list of lists of Python integers.
    hashed = [np.unique(np.array(h, np.uint64)) for h in RMinHash.hash_token_sets([_shingles(t) for t in texts])]
    counts = np.array([len(one) for one in hashed], np.uint32)
    shingles = np.concatenate(hashed) if hashed else np.empty(0, np.uint64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, PERMUTATIONS, _SEED)
    bands = band_count(threshold)
    rows = PERMUTATIONS // bands
    values = np.array(digests.to_rows(), np.uint64).reshape(len(texts), PERMUTATIONS)[:, : bands * rows]
    return Sketches(_combine(values.reshape(len(texts), bands, rows)), shingles, counts)


def groups(path: Path) -> Iterator[NDArray[np.int64]]:
    """Find the values that occur more than once in a file of uint64. Yields the positions of each, ascending.

    Values are sorted in parts that fit into memory. All positions of a value are in one part.
    """
    parts = max(1, -(-path.stat().st_size // (8 * _PART_ROWS)))
    for part in range(parts):
        positions, values, start = [], [], 0
        with path.open("rb") as file:
            while len(chunk := np.fromfile(file, np.uint64, _PART_ROWS)):
                chosen = np.flatnonzero(chunk % np.uint64(parts) == part)
                positions.append(chosen + start)
                values.append(chunk[chosen])
                start += len(chunk)
        if not values:
            return
        hashes = np.concatenate(values)
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], np.concatenate(positions)[order]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
        ends = np.append(starts[1:], len(hashes))
        for first, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            yield places[first:end]


class Clusters:
    """Joins rows into clusters (union-find). A cluster is identified by its first row."""

    def __init__(self, rows: int) -> None:
        self.first = np.arange(rows, dtype=np.int64)

    def find(self, row: int) -> int:
        """The first row of the cluster that holds `row`."""
        while self.first[row] != row:
            self.first[row] = self.first[self.first[row]]
            row = int(self.first[row])
        return row

    def join(self, one: int, other: int) -> None:
        """Join the clusters of two rows."""
        low, high = sorted((self.find(one), self.find(other)))
        self.first[high] = low

    def members(self) -> Iterator[list[int]]:
        """The rows of each cluster with at least two rows, ascending."""
        others: dict[int, list[int]] = {}
        for row in np.flatnonzero(self.first != np.arange(len(self.first))).tolist():
            others.setdefault(self.find(row), []).append(row)
        for first in sorted(others):
            yield [first, *others[first]]


def join_near_duplicates(clusters: Clusters, bands: Sequence[Path], shingles: ShingleFile, threshold: float) -> None:
    """Join rows whose shingle sets have at least this Jaccard similarity.

    Args:
        bands: one file for each band, with the band's uint64 hash of each row.
    """
    for path in bands:
        for group in groups(path):
            leaders: list[tuple[int, frozenset[int]]] = []
            for row in group.tolist():
                roots = {clusters.find(leader) for leader, _ in leaders}
                if clusters.find(row) in roots:
                    continue
                own = shingles.of(row)
                near = next((leader for leader, other in leaders if _jaccard(own, other) >= threshold), None)
                if near is not None:
                    clusters.join(near, row)
                elif len(leaders) < _MAX_LEADERS:
                    leaders.append((row, own))


class ShingleFile:
    """Reads the shingle hashes of single rows from a file.

    Args:
        path: a file of uint64 values: the hashes of the first row, then those of the second, and so on.
        counts: number of hashes of each row.
    """

    def __init__(self, path: Path, counts: NDArray[np.uint32]) -> None:
        self._file = path.open("rb")
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._counts = counts

    def of(self, row: int) -> frozenset[int]:
        """The hashes of a row's shingles."""
        count = int(self._counts[row])
        self._file.seek(8 * (int(self._ends[row]) - count))
        return frozenset(np.fromfile(self._file, np.uint64, count).tolist())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _shingles(text: str) -> list[str]:
    tokens = words(text)
    if not tokens:
        # A text of only punctuation is similar only to an equal text.
        return [text]
    count = max(1, len(tokens) - SHINGLE_WORDS + 1)
    return [" ".join(tokens[i : i + SHINGLE_WORDS]) for i in range(count)]


def _combine(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash the last axis to one value, by FNV-1a over 64-bit words."""
    combined = np.full(values.shape[:-1], 14695981039346656037, np.uint64)
    for k in range(values.shape[-1]):
        combined = (combined ^ values[..., k]) * np.uint64(1099511628211)
    return combined


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)


_COMPARED_WORD = re.compile(rb"[^ ]+")
# Maximum number of characters that a match quotes from the shared text.
QUOTE_CHARS = 100


class EvaluationIndex:
    """The n-grams of evaluation rows, as 64-bit hashes. Takes about 90 bytes for each word of the evaluation files.

    Two rows share an n-gram if n consecutive words are equal, without case and punctuation. Each message of a prompt or
    an answer counts alone. System messages do not count, because all rows of a dataset share them. An evaluation prompt
    of fewer than n words is compared as a whole, with whole prompts only. A short answer proves nothing.

    Args:
        n: words in an n-gram. GPT-3's evaluation used 13.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.grams: set[int] = set()
        self.short_prompts: set[int] = set()
        # The numbers of words of short prompts.
        self._short_lengths: set[int] = set()

    def add(self, row: Row) -> None:
        """Add an evaluation row."""
        for message in _messages(row):
            self._add_grams(message.content)
        self._add_short(_prompt(row))

    def add_text(self, text: str) -> None:
        """Add a text that may be a prompt or an answer."""
        self._add_grams(text)
        self._add_short(normalised(text).encode())

    def _add_grams(self, text: str) -> None:
        self.grams.update(xxhash.xxh3_64_intdigest(gram) for gram in self._grams(text))

    def _add_short(self, prompt: bytes) -> None:
        if prompt and prompt.count(b" ") + 1 < self.n:
            self.short_prompts.add(xxhash.xxh3_64_intdigest(prompt))
            self._short_lengths.add(prompt.count(b" ") + 1)

    def match(self, row: Row) -> str:
        """Up to QUOTE_CHARS characters of the first words that a training row shares with an evaluation row, or ""."""
        if self.grams:
            for message in _messages(row):
                for gram in self._grams(message.content):
                    if xxhash.xxh3_64_intdigest(gram) in self.grams:
                        return gram.decode()[:QUOTE_CHARS]
        if self.short_prompts:
            prompt = _prompt(row)
            if xxhash.xxh3_64_intdigest(prompt) in self.short_prompts:
                return prompt.decode()[:QUOTE_CHARS]
        return ""

    def question_in(self, text: str) -> str:
        """Up to QUOTE_CHARS characters of a short evaluation prompt that stands within a text, or "".

        Rewritings of documents have whole questions in them, such as those of an FAQ.
        """
        for length in sorted(self._short_lengths):
            for gram in self._grams(text, length):
                if xxhash.xxh3_64_intdigest(gram) in self.short_prompts:
                    return gram.decode()[:QUOTE_CHARS]
        return ""

    def _grams(self, text: str, n: int | None = None) -> Iterator[bytes]:
        folded = normalised(text).encode()
        spans = [match.span() for match in _COMPARED_WORD.finditer(folded)]
        for first, last in zip(spans, spans[(n or self.n) - 1 :], strict=False):
            yield folded[first[0] : last[1]]


def _messages(row: Row) -> Iterator[Message]:
    messages = chain(row.prompt, *row.answers)
    return (message for message in messages if message.role != "system")


def _prompt(row: Row) -> bytes:
    return normalised(" ".join(message.content for message in row.prompt if message.role != "system")).encode()
