"""Tables to browse, filtered and paged in Arrow: only the records of one page become Python objects."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

Positions = NDArray[np.int64]


class DatasetVersion(NamedTuple):
    """A line of the list of datasets.

    Attributes:
        key: its name in addresses.
        title: its name for people, with the number of the version.
        created: when it was made, in UTC; empty for a file.
        made_by: the run that made it; empty for a file.
        rows: its rows, e.g. `train 120, validation 15, test 15`.
    """

    key: str
    title: str
    created: str
    made_by: str
    rows: str


class Table:
    """The records of one or several datasets with the same columns, in order, memory-mapped if the datasets are.

    Args:
        parts: the datasets by name, e.g. the splits.
    """

    def __init__(self, parts: Mapping[str, Dataset]) -> None:
        tables: list[pa.Table] = []
        self.parts: dict[str, range] = {}
        self.rows = 0
        for name, dataset in parts.items():
            whole = dataset if dataset._indices is None else dataset.flatten_indices()
            tables.append(whole.data.table)
            self.parts[name] = range(self.rows, self.rows + len(whole))
            self.rows += len(whole)
        self._table = pa.concat_tables(tables)

    def records(self, positions: Sequence[int] | Positions) -> list[dict[str, Any]]:
        """The records at these positions, as Python objects."""
        return [self._table.slice(int(position), 1).to_pylist()[0] for position in positions]

    def part_of(self, position: int) -> str:
        """The name of the dataset that has a position."""
        return next(name for name, places in self.parts.items() if position in places)

    @property
    def all(self) -> Positions:
        """All positions."""
        return np.arange(self.rows)

    def holding(self, search: str) -> Positions:
        """The records with a text that holds `search`, in upper or lower case."""
        found = np.zeros(self.rows, bool)
        for texts, rows in self._texts():
            found[rows[_true(pc.match_substring(texts, search, ignore_case=True))]] = True
        return np.flatnonzero(found)

    def where(self, column: str, *, equals: Collection[str] | None = None, holds: str = "") -> Positions:
        """The records whose text in a column is one of `equals`, or holds `holds` in upper or lower case."""
        if equals is not None:
            return _true(pc.is_in(self._table[column], pa.array(equals, pa.string())))
        return _true(pc.match_substring(self._table[column], holds, ignore_case=True))

    def counts(self, column: str) -> dict[str, int]:
        """How often each text stands in a column, the most frequent first."""
        found = pc.value_counts(self._table[column]).to_pylist()
        return {entry["values"]: entry["counts"] for entry in sorted(found, key=lambda entry: -entry["counts"])}

    def numbers(self, column: str) -> NDArray[Any]:
        """A column of numbers."""
        return np.asarray(self._table[column])

    @cached_property
    def chars(self) -> NDArray[np.int64]:
        """The characters of each record's messages, texts and answers."""
        total = np.zeros(self.rows, np.int64)
        for texts, rows in self._texts(content_only=True):
            np.add.at(total, rows, pc.fill_null(pc.utf8_length(texts), 0).to_numpy())
        return total

    def _texts(self, content_only: bool = False) -> Iterator[tuple[pa.ChunkedArray, Positions]]:
        """The texts, column by column, with the row of each."""
        for name, column in zip(self._table.column_names, self._table.columns, strict=True):
            if pa.types.is_string(column.type) and (not content_only or name == "text"):
                yield column, self.all
            elif pa.types.is_list(column.type):
                rows, inner = pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column)
                if pa.types.is_struct(inner.type):
                    yield from ((pc.struct_field(inner, field), rows) for field in ("content", "reasoning_content"))
                else:
                    yield inner, rows


class Filter(NamedTuple):
    """Which rows to show; empty fields show all.

    Attributes:
        search: text that a row holds, in any of its columns.
        source: text that the source holds.
        finding: the name of a rule, for the rows that it reports or sets aside.
        decision: `none`, `any`, or the action of the decision that counts.
        least, most: characters.
    """

    search: str = ""
    split: str = ""
    source: str = ""
    finding: str = ""
    decision: str = ""
    least: int | None = None
    most: int | None = None

    def rows(self, table: Table, found: Collection[str], decided: Mapping[str, str], joined_by: str) -> Positions:
        """The positions of the rows to show, ascending.

        Args:
            found: the values of the column `joined_by` of the rows that the rule `finding` matched.
            decided: the action of the decision on each row, by id.
        """
        places = table.parts[self.split] if self.split else range(table.rows)
        chosen = _mask(table, np.arange(places.start, places.stop))
        if self.search:
            chosen &= _mask(table, table.holding(self.search))
        if self.source:
            chosen &= _mask(table, table.where("source", holds=self.source))
        if self.finding:
            chosen &= _mask(table, table.where(joined_by, equals=found))
        if self.decision:
            wanted = [row for row, action in decided.items() if self.decision in ("none", "any", action)]
            has_it = _mask(table, table.where("id", equals=wanted))
            chosen &= ~has_it if self.decision == "none" else has_it
        if self.least is not None:
            chosen &= table.chars >= self.least
        if self.most is not None:
            chosen &= table.chars <= self.most
        return np.flatnonzero(chosen)


def _mask(table: Table, positions: Positions) -> NDArray[np.bool_]:
    mask = np.zeros(table.rows, bool)
    mask[positions] = True
    return mask


def _true(mask: pa.ChunkedArray) -> Positions:
    return np.asarray(pc.indices_nonzero(mask), np.int64)
