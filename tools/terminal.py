"""Tables for the terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table


def console(file: TextIO | None = None, width: int = 120) -> Console:
    """A console on a file, by default stdout.

    Args:
        width: columns without a terminal, for which rich would use 80. This is too narrow for logs and pipes.
    """
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else width, highlight=False, markup=False)


def titled_table(title: str, *columns: str) -> Table:
    """A table with a bold title, whose cells break long texts into lines."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in ("Seconds", "Read", "Kept") else "left")
    return table
