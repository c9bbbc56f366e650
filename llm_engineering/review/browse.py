"""Datasets to browse."""

from __future__ import annotations

from typing import NamedTuple


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
