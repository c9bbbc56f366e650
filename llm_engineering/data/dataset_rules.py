"""Judges rows by comparing them with the other rows: duplicates, leaks across splits, conflicts, outliers, large documents.

The hashes of the rows are in files; memory holds about 30 bytes for each row.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from llm_engineering.data.examine import Examined
from llm_engineering.data.rows import SPLITS
from llm_engineering.data.similarity import Clusters, ShingleFile, band_count, groups, join_near_duplicates
from llm_engineering.recipe.data_blocks import DataConfig

# Tukey's outer fences (Exploratory Data Analysis, 1977): a value beyond three interquartile ranges is "far out".
_FENCE = 3.0
# A dataset with fewer rows does not show which values are usual.
_MIN_ROWS = 100
# A language with a smaller share of the rows is probably there by accident.
_MIN_LANGUAGE_SHARE = 0.02
# Where a document has a larger share of a held-out split, the measures tell more about it than about the other documents.
MAX_DOCUMENT_SHARE = 0.25
OVER_QUARTER = "document_over_quarter"
# The assumed correlation of values of rows of one document, to compare many rows of few documents with fewer, balanced rows.
_CORRELATION = 0.2


def length_bounds(lengths: NDArray[np.uint32]) -> tuple[float, float]:
    """The shortest and longest usual length: Tukey's outer fences of the logarithms, because lengths are skewed."""
    if len(lengths) < _MIN_ROWS:
        return 0.0, float("inf")
    low, high = np.quantile(np.log1p(lengths.astype(np.float64)), [0.25, 0.75])
    # If nearly all rows have the same length, the spread is near 0. A factor of two is always accepted.
    spread = max(high - low, np.log(2) / _FENCE)
    return float(np.expm1(low - _FENCE * spread)), float(np.expm1(high + _FENCE * spread))


def rare_languages(languages: Sequence[str], counts: NDArray[np.int64]) -> set[str]:
    """The languages of fewer than 2 % of the rows.

    Args:
        languages: language codes; the empty code is for rows of unknown language.
        counts: rows in each language.
    """
    known = Counter({name: int(count) for name, count in zip(languages, counts, strict=True) if name})
    if known.total() < _MIN_ROWS:
        return set()
    return {name for name, count in known.items() if count < _MIN_LANGUAGE_SHARE * known.total()}


def document_limit(counts: Sequence[int]) -> int | None:
    """The most rows of a document that a held-out split keeps, so that no document has more than a quarter of the kept rows.

    Args:
        counts: rows of each document of the split; 1 for a row without a document.

    Returns:
        None if nothing is to be removed: (a) no document has more than a quarter; (b) fewer than four documents; (c) removing
        rows would make the mean less certain (`_variance`).
    """

    def over(limit: int) -> bool:
        return limit > MAX_DOCUMENT_SHARE * sum(min(count, limit) for count in counts)

    largest = max(counts, default=0)
    limit = bisect_left(range(1, largest + 1), True, key=over)
    if limit in (0, largest) or _variance([min(count, limit) for count in counts]) > _variance(counts):
        return None
    return limit


def _variance(counts: Sequence[int]) -> float:
    """The variance of a mean over documents of so many rows, if a single row has variance 1."""
    return sum(count * (1 + _CORRELATION * (count - 1)) for count in counts) / sum(counts) ** 2


_HASHES = ("ids", "prompts", "answers", "rejected_answers", "documents")


class Verdict(NamedTuple):
    """The verdict of one rule on a row.

    Attributes:
        rule: the name of the rule; for leaks `leaks_into_validation` or `leaks_into_test`; for rows of a document that has
            too many of a held-out split, OVER_QUARTER.
        other: the row that it is compared with, or -1.
        drops: whether the row is quarantined; otherwise it is reported.
    """

    rule: str
    other: int
    drops: bool


class RowIndex:
    """Hashes, lengths, languages and sources of every row that `examine` kept, by row number. A context manager.

    Single values are read from the files by position. Memory-mapped files would count as memory of the process.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.folder = folder
        self.bands = [folder / f"band-{k}" for k in range(band_count(config.near_duplicate_threshold))]
        self.rows = 0
        self.languages: dict[str, int] = {}
        columns = ("splits", "labels", "lengths", "codes", "counts", "generated", "source_bytes")
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
        names = [*(folder / name for name in (*_HASHES, "shingles", "sources")), *self.bands]
        self._stack = ExitStack()
        self._files = {path.name: self._stack.enter_context(path.open("w+b")) for path in names}
        self._ends: NDArray[np.int64] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, batch: Examined) -> None:
        """Add the rows of a batch."""
        for name in _HASHES:
            getattr(batch, name).tofile(self._files[name])
        for k, path in enumerate(self.bands):
            np.ascontiguousarray(batch.sketches.bands[:, k]).tofile(self._files[path.name])
        batch.sketches.shingles.tofile(self._files["shingles"])
        codes = [self.languages.setdefault(name, len(self.languages)) for name in batch.languages]
        self._parts["codes"].append(np.array(codes, np.uint16))
        self._parts["splits"].append(batch.splits)
        self._parts["labels"].append(batch.labels)
        self._parts["lengths"].append(batch.lengths)
        self._parts["counts"].append(batch.sketches.counts)
        self._parts["generated"].append(batch.generated)
        sources = [source.encode() for source in batch.kept.column("source").to_pylist()]
        self._files["sources"].write(b"".join(sources))
        self._parts["source_bytes"].append(np.array([len(source) for source in sources], np.uint32))
        self.rows += len(batch.splits)

    def column(self, name: str) -> NDArray[Any]:
        """One value for each row: `splits`, `labels`, `lengths`, `codes` of `languages`, shingle `counts` or `generated`."""
        if len(self._parts[name]) > 1:
            self._parts[name] = [np.concatenate(self._parts[name])]
        return self._parts[name][0] if self._parts[name] else np.empty(0, np.uint32)

    def hash(self, name: str, row: int) -> int:
        """A row's hash of the kind `ids`, `prompts`, `answers` or `rejected_answers`."""
        return int.from_bytes(self._read(name, 8 * row, 8), sys.byteorder)

    def names(self, row: int) -> dict[str, str]:
        """A row's `id` and `source`."""
        if self._ends is None:
            self._ends = np.cumsum(self.column("source_bytes"), dtype=np.int64)
        count = int(self.column("source_bytes")[row])
        source = self._read("sources", int(self._ends[row]) - count, count).decode()
        return {"id": f"{self.hash('ids', row):016x}", "source": source}

    def _read(self, name: str, start: int, count: int) -> bytes:
        return os.pread(self._files[name].fileno(), count, start)

    def flush(self) -> None:
        """Write all buffers to the files, so that the values can be read."""
        for file in self._files.values():
            file.flush()


class Verdicts:
    """The verdicts of all rules on all rows.

    Attributes:
        by_row: the verdicts on each row that has any.
        clusters: the rows of each cluster of duplicates.
        leaked: held-out rows that also occur in an earlier split of `SPLITS`.
        limits: `document_limit` of each held-out split that has one, by its index in `SPLITS`.
    """

    def __init__(self, index: RowIndex, config: DataConfig, remove_leaks: bool) -> None:
        self.by_row: dict[int, list[Verdict]] = {}
        self.clusters: list[list[int]] = []
        self.leaked: set[int] = set()
        self.limits: dict[int, int] = {}
        self._index = index
        self._rules = config.rules
        self._remove_leaks = remove_leaks
        self._splits = index.column("splits")
        self._labels = index.column("labels")
        self._generated = index.column("generated")
        self._exact: set[int] = set()

    def drop_of(self, row: int) -> Verdict | None:
        """The verdict that quarantines a row, or None."""
        return next((verdict for verdict in self.by_row.get(row, ()) if verdict.drops), None)

    def match(self, rule: str, row: int, other: int = -1) -> None:
        """Add a verdict on a row that a rule of the recipe matches, according to the rule's switch."""
        action = getattr(self._rules, rule)
        if action != "off":
            drops = action == "drop" or (action == "drop_generated" and bool(self._generated[row]))
            self.by_row.setdefault(row, []).append(Verdict(rule, other, drops))

    def leaks(self, rows: Iterable[int]) -> None:
        """Given similar rows, mark as leaks all that are in an earlier split of `SPLITS` than the last of them."""
        kept = [row for row in rows if self.drop_of(row) is None]
        top = max(kept, key=lambda row: (self._splits[row], -row), default=-1)
        lower = [row for row in kept if self._splits[row] < self._splits[top]]
        if lower:
            split = self._splits[top]
            self.leaked |= {row for row in rows if self._splits[row] == split}
            for row in lower:
                leak = Verdict(f"leaks_into_{SPLITS[int(split)]}", top, self._remove_leaks)
                # Similar rows usually have the same prompt too. The row still counts as one leak.
                if all(verdict.rule != leak.rule for verdict in self.by_row.get(row, ())):
                    self.by_row.setdefault(row, []).append(leak)

    def duplicates(self, rows: Iterable[int], rule: str) -> None:
        """Given similar rows, mark all but the first of each split and label as duplicates. Skips exact duplicates."""
        first: dict[tuple[int, int], int] = {}
        for row in rows:
            earlier = first.setdefault((int(self._splits[row]), int(self._labels[row])), row)
            if earlier != row and row not in self._exact and not self._other_comparison(row, earlier):
                self.match(rule, row, earlier)
                if rule == "exact_duplicate":
                    self._exact.add(row)

    def _other_comparison(self, row: int, earlier: int) -> bool:
        """Whether two pairs compare the same answer to the same prompt with different rejected answers."""
        same = all(self._index.hash(name, row) == self._index.hash(name, earlier) for name in ("prompts", "answers"))
        return same and self._index.hash("rejected_answers", row) != self._index.hash("rejected_answers", earlier)

    def conflicts(self, rows: list[int]) -> None:
        """Given rows with the same prompt, mark rows with different answers.

        Pairs are marked if the chosen answer of one is the rejected answer of another, and bad answers if they are also
        good ones.
        """
        answers = {row: self._index.hash("answers", row) for row in rows}
        if self._labels[rows[0]]:
            good = {answers[row]: row for row in rows if self._labels[row] == 2}
            for row in rows:
                if self._labels[row] == 1 and answers[row] in good:
                    self.match("conflicting_answers", row, good[answers[row]])
            return
        rejected = {self._index.hash("rejected_answers", row): row for row in rows}
        for row in rows:
            # Instruction rows have no rejected answer: its hash is 0.
            if 0 in rejected and answers[row] != answers[rows[0]]:
                self.match("conflicting_answers", row, rows[0])
            elif 0 not in rejected and answers[row] in rejected:
                self.match("conflicting_answers", row, rejected[answers[row]])

    def balance(self) -> None:
        """Set rows aside of documents that have more than a quarter of the rows of a held-out split.

        The rows with the smallest ids stay, so rows that are added elsewhere do not change which ones.
        """
        dropped = np.zeros(self._index.rows, bool)
        dropped[[row for row in self.by_row if self.drop_of(row) is not None]] = True
        documents: dict[int, list[list[int]]] = {}
        for group in groups(self._index.folder / "documents"):
            if not self._index.hash("documents", int(group[0])):
                continue
            kept = group[(self._splits[group] > 0) & ~dropped[group]].tolist()
            if kept:
                documents.setdefault(int(self._splits[kept[0]]), []).append(kept)
        for split, found in documents.items():
            sizes = [len(rows) for rows in found]
            others = int(((self._splits == split) & ~dropped).sum()) - sum(sizes)
            limit = document_limit([*sizes, *[1] * others])
            if limit is not None:
                self.limits[split] = limit
                for rows in found:
                    for row in sorted(rows, key=lambda row: self._index.hash("ids", row))[limit:]:
                        self.by_row.setdefault(row, []).append(Verdict(OVER_QUARTER, -1, True))

    def outliers(self) -> None:
        """Mark rows of unusual length, and rows in a rare language."""
        lengths = self._index.column("lengths")
        short, long = length_bounds(lengths)
        for row in np.flatnonzero((lengths < short) | (lengths > long)).tolist():
            self.match("length_outlier", row)
        codes, languages = self._index.column("codes"), self._index.languages
        rare = rare_languages(list(languages), np.bincount(codes, minlength=len(languages)))
        for row in np.flatnonzero(np.isin(codes, [languages[name] for name in rare])).tolist():
            self.match("language_outlier", row)


def judge(index: RowIndex, config: DataConfig, remove_leaks: bool) -> Verdicts:
    """Compare every row with the others.

    Args:
        remove_leaks: quarantine training rows that also occur in a held-out split; otherwise they are reported.
    """
    index.flush()
    verdicts = Verdicts(index, config, remove_leaks)
    clusters = Clusters(index.rows)
    for group in groups(index.folder / "ids"):
        rows = group.tolist()
        verdicts.duplicates(rows, "exact_duplicate")
        for row in rows[1:]:
            clusters.join(rows[0], row)
    with ShingleFile(index.folder / "shingles", index.column("counts")) as shingles:
        join_near_duplicates(clusters, index.bands, shingles, config.near_duplicate_threshold)
    for rows in clusters.members():
        verdicts.duplicates(rows, "near_duplicate")
        verdicts.leaks(rows)
        verdicts.clusters.append(rows)
    for group in groups(index.folder / "prompts"):
        rows = [row for row in group.tolist() if verdicts.drop_of(row) is None]
        if len(rows) > 1:
            verdicts.leaks(group.tolist())
            verdicts.conflicts(rows)
    verdicts.outliers()
    verdicts.balance()
    return verdicts
