"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


class Progress:
    """Counts `total` things.

    Args:
        what: what is counted, e.g. `questions`.
        total: how many there will be; 0 shows nothing.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=total, desc=what, file=sys.stderr) if total and sys.stderr.isatty() else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more are done, and show a note, e.g. the cost, beside the count."""
        self.done += count
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
            if self.done >= self.total:
                self.bar.close()
        elif time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.say(note)

    def say(self, note: str) -> None:
        """Show a note, e.g. the loss, beside the count."""
        if self.bar is not None and self.done < self.total:
            self.bar.set_postfix_str(note)
            return
        self.last_line = time.monotonic()
        rate = self.done / max(self.last_line - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        count = f"{self.done} of {self.total}, {rate:.1f} a second, {left:.0f} s left"
        logger.info("%s: %s%s", self.what, count, f" — {note}" if note else "")
