"""Decides about rows by comparing them with the other rows: duplicates, leaks across splits, conflicts, outliers.

What is needed of each row is kept in files; memory holds about 30 bytes a row.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from llm_engineering.data.duplicates import Clusters, ShingleFile, band_count, groups, join_near_duplicates
from llm_engineering.data.examine import Examined
from llm_engineering.data.rows import SPLITS
from llm_engineering.recipe.data_blocks import DataConfig

# Tukey's outer fences (Exploratory Data Analysis, 1977): beyond three interquartile ranges a value is far out.
_FENCE = 3.0
# In smaller datasets nothing is usual yet.
_MIN_ROWS = 100
# A language with a smaller share of the rows is there by accident.
_MIN_LANGUAGE_SHARE = 0.02


def length_bounds(lengths: NDArray[np.uint32]) -> tuple[float, float]:
    """The shortest and longest usual length: Tukey's outer fences of the logarithms, as lengths are skewed."""
    if len(lengths) < _MIN_ROWS:
        return 0.0, float("inf")
    low, high = np.quantile(np.log1p(lengths.astype(np.float64)), [0.25, 0.75])
    # Rows of nearly one length have no spread to judge by: a factor of two is never far out.
    spread = max(high - low, np.log(2) / _FENCE)
    return float(np.expm1(low - _FENCE * spread)), float(np.expm1(high + _FENCE * spread))


def rare_languages(languages: Sequence[str], counts: NDArray[np.int64]) -> set[str]:
    """The languages that so few rows are in that they stand out.

    Args:
        languages: codes, the empty one for rows whose language is not known.
        counts: rows in each.
    """
    known = Counter({name: int(count) for name, count in zip(languages, counts, strict=True) if name})
    if known.total() < _MIN_ROWS:
        return set()
    return {name for name, count in known.items() if count < _MIN_LANGUAGE_SHARE * known.total()}


_HASHES = ("ids", "prompts", "answers", "others")


class Verdict(NamedTuple):
    """What one rule says of a row.

    Attributes:
        rule: its name; for leaks `leaks_into_validation` or `leaks_into_test`.
        other: the row it is judged by, or -1.
        drops: whether the row is set aside; else it is reported.
    """

    rule: str
    other: int
    drops: bool


class RowIndex:
    """What is known of every row that passed the first look, by its number. A context manager.

    Its files are read at the place that is asked for. Mapped into memory they would count as memory, and grow.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.folder = folder
        self.bands = [folder / f"band-{k}" for k in range(band_count(config.near_duplicate_threshold))]
        self.rows = 0
        self.languages: dict[str, int] = {}
        self._parts: dict[str, list[NDArray[Any]]] = {"sides": [], "lengths": [], "codes": [], "counts": []}
        self._parts |= {"generated": [], "source_bytes": []}
        names = [*(folder / name for name in (*_HASHES, "shingles", "sources")), *self.bands]
        self._stack = ExitStack()
        self._files = {path.name: self._stack.enter_context(path.open("w+b")) for path in names}
        self._ends: NDArray[np.int64] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self._parts["sides"].append(batch.sides)
        self._parts["lengths"].append(batch.lengths)
        self._parts["counts"].append(batch.sketches.counts)
        self._parts["generated"].append(batch.generated)
        sources = [source.encode() for source in batch.kept.column("source").to_pylist()]
        self._files["sources"].write(b"".join(sources))
        self._parts["source_bytes"].append(np.array([len(source) for source in sources], np.uint32))
        self.rows += len(batch.sides)

    def column(self, name: str) -> NDArray[Any]:
        """`sides`, `lengths`, `codes` of `languages`, shingle `counts` or `generated`, a value for each row."""
        if len(self._parts[name]) > 1:
            self._parts[name] = [np.concatenate(self._parts[name])]
        return self._parts[name][0] if self._parts[name] else np.empty(0, np.uint32)

    def hash(self, name: str, row: int) -> int:
        """A row's `ids`, `prompts`, `answers` or `others`."""
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
        """Bring everything to the files, so that it can be read."""
        for file in self._files.values():
            file.flush()


class Verdicts:
    """What the rules say of the rows.

    Attributes:
        by_row: verdicts of each row that has any.
        clusters: the rows of each cluster of duplicates.
        leaked: held-out rows that stand on a less held-out side too.
    """

    def __init__(self) -> None:
        self.by_row: dict[int, list[Verdict]] = {}
        self.clusters: list[list[int]] = []
        self.leaked: set[int] = set()

    def drop_of(self, row: int) -> Verdict | None:
        """The verdict that sets a row aside, or None."""
        return next((verdict for verdict in self.by_row.get(row, ()) if verdict.drops), None)


class _Judge:
    def __init__(self, index: RowIndex, config: DataConfig) -> None:
        self.index = index
        self.rules = config.rules
        self.sides = index.column("sides")
        self.generated = index.column("generated")
        self.verdicts = Verdicts()
        self.exact: set[int] = set()

    def say(self, rule: str, row: int, other: int = -1) -> None:
        """A rule of the recipe matches a row: do what its switch says."""
        action = getattr(self.rules, rule)
        if action != "off":
            drops = action == "drop" or (action == "drop_generated" and bool(self.generated[row]))
            self._add(row, Verdict(rule, other, drops))

    def leaks(self, rows: Iterable[int], remove: bool) -> None:
        """Of rows that are alike, those on the less held-out sides leak."""
        kept = [row for row in rows if self.verdicts.drop_of(row) is None]
        top = max((row for row in kept), key=lambda row: (self.sides[row], -row), default=-1)
        lower = [row for row in kept if self.sides[row] < self.sides[top]]
        if lower:
            side = self.sides[top]
            self.verdicts.leaked |= {row for row in rows if self.sides[row] == side}
            for row in lower:
                leak = Verdict(f"leaks_into_{SPLITS[int(side)]}", top, remove)
                # Rows that are alike mostly have the same prompt too: that is one leak.
                if all(verdict.rule != leak.rule for verdict in self.verdicts.by_row.get(row, ())):
                    self._add(row, leak)

    def duplicates(self, rows: Iterable[int], rule: str) -> None:
        """Of rows that are alike, all but the first of each side repeat it. What repeats exactly is not near as well."""
        first: dict[int, int] = {}
        for row in rows:
            earlier = first.setdefault(int(self.sides[row]), row)
            if earlier != row and row not in self.exact:
                self.say(rule, row, earlier)

    def conflicts(self, rows: list[int]) -> None:
        """Rows of one prompt whose answers differ; of pairs, those whose chosen answer another one rejects."""
        answers = {row: self.index.hash("answers", row) for row in rows}
        rejected = {self.index.hash("others", row): row for row in rows}
        if 0 in rejected:
            found = [(row, rows[0]) for row in rows if answers[row] != answers[rows[0]]]
        else:
            found = [(row, rejected[answers[row]]) for row in rows if answers[row] in rejected]
        for row, other in found:
            self.say("conflicting_answers", row, other)

    def _add(self, row: int, verdict: Verdict) -> None:
        self.verdicts.by_row.setdefault(row, []).append(verdict)


def judge(index: RowIndex, config: DataConfig, remove_leaks: bool) -> Verdicts:
    """Judge every row by the others.

    Args:
        remove_leaks: set aside training rows that stand on a held-out side too; else they are reported.
    """
    index.flush()
    say = _Judge(index, config)
    clusters = Clusters(index.rows)
    for group in groups(index.folder / "ids"):
        rows = group.tolist()
        say.duplicates(rows, "exact_duplicate")
        first = {int(say.sides[row]): row for row in reversed(rows)}
        say.exact |= set(rows) - set(first.values())
        for row in rows[1:]:
            clusters.join(rows[0], row)
    with ShingleFile(index.folder / "shingles", index.column("counts")) as shingles:
        join_near_duplicates(clusters, index.bands, shingles, config.near_duplicate_threshold)
    for rows in clusters.members():
        say.duplicates(rows, "near_duplicate")
        say.leaks(rows, remove_leaks)
        say.verdicts.clusters.append(rows)
    for group in groups(index.folder / "prompts"):
        rows = [row for row in group.tolist() if say.verdicts.drop_of(row) is None]
        if len(rows) > 1:
            say.leaks(group.tolist(), remove_leaks)
            say.conflicts(rows)
    _outliers(index, say)
    return say.verdicts


def _outliers(index: RowIndex, say: _Judge) -> None:
    lengths = index.column("lengths")
    short, long = length_bounds(lengths)
    for row in np.flatnonzero((lengths < short) | (lengths > long)).tolist():
        say.say("length_outlier", row)
    codes = index.column("codes")
    names = list(index.languages)
    rare = rare_languages(names, np.bincount(codes, minlength=len(names)))
    for row in np.flatnonzero(np.isin(codes, [index.languages[name] for name in rare])).tolist():
        say.say("language_outlier", row)
