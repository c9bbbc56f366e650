"""Shows the progress of long work: a bar on a terminal, elsewhere one log line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
# The rate is that of the last minute, or of the last item if it took longer. A mean over all items would count a stall,
# e.g. of a machine that slept, to the end.
RATE_WINDOW_S = 60.0
# The bar keeps its width beside a long note. tqdm cuts the end of a line that is wider than the terminal.
_BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def counted(count: int, noun: str) -> str:
    """A number with its noun, e.g. `1 row` and `1,200 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines to stderr, above a bar that is on the terminal."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Clear the bar, write the line, and draw the bar again."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


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
        self.recent = deque([(self.started, 0)])
        self.bar = (
            # TQDM_DISABLE, which the command line sets where stderr is no terminal, is for the bars of libraries.
            tqdm(total=total, desc=title, file=sys.stderr, bar_format=_BAR, dynamic_ncols=True, disable=False)
            if total and sys.stderr.isatty()
            else None
        )

    def advance(self, count: int = 1, note: str = "", *, show: bool = True) -> None:
        """Count `count` more items, with a note, e.g. the cost.

        Args:
            show: False if `say` follows with a note about these items, so that no line is printed without the note.
        """
        self.done += count
        self.recent.append((time.monotonic(), self.done))
        while len(self.recent) > 2 and self.recent[0][0] < self.recent[-1][0] - RATE_WINDOW_S:
            self.recent.popleft()
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
        (start, before), (end, done) = self.recent[0], self.recent[-1]
        each_s = (end - start) / max(done - before, 1)
        rate = f"{each_s:.1f} s each" if each_s >= 1 else f"{1 / max(each_s, 1e-9):.1f} a second"
        count = f"{self.done} of {self.total}, {rate}, {duration((self.total - self.done) * each_s)} left"
        logger.info("%s: %s%s", self.title, count, f" — {self.note}" if self.note else "")


def duration(seconds: float) -> str:
    """A time in the largest unit that tells enough, e.g. `90 s`, `12 min` and `2 h 5 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
