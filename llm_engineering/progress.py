"""Shows the progress of long work: a bar on a terminal, elsewhere one log line every few seconds."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY_S = 5.0


class Progress:
    """Counts items up to `total`, and shows the count, the rate and the remaining time.

    Args:
        title: the name of the items, e.g. `questions`.
        total: the number of items; 0 shows nothing.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.note = ""
        self.shown = 0
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=total, desc=title, file=sys.stderr) if total and sys.stderr.isatty() else None

    def advance(self, count: int = 1, note: str = "", *, show: bool = True) -> None:
        """Count `count` more items, with a note, e.g. the cost.

        Args:
            show: False if `say` follows with a note about these items, so that no line is printed without the note.
        """
        self.done += count
        if note:
            self.note = note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
            if self.done >= self.total:
                self.bar.close()
        elif show:
            self._line()

    def say(self, note: str) -> None:
        """Show a note, e.g. the loss, next to the count."""
        self.note = note
        if self.bar is None:
            self._line()
        elif self.done < self.total:
            self.bar.set_postfix_str(note)

    def end(self) -> None:
        """Close the bar, or print the last count unless it is printed already."""
        if self.bar is not None:
            self.bar.close()
        else:
            self._line(every_s=0.0)

    def _line(self, every_s: float = LINE_EVERY_S) -> None:
        now = time.monotonic()
        if self.done == self.shown or now - self.last_line < every_s:
            return
        self.last_line, self.shown = now, self.done
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        count = f"{self.done} of {self.total}, {rate:.1f} a second, {left:.0f} s left"
        logger.info("%s: %s%s", self.title, count, f" — {self.note}" if self.note else "")
