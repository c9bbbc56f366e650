"""Parts of static HTML reports. They have no scripts, because the dashboard sandboxes them; charts are inline SVG."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib

matplotlib.use("svg")  # Before pyplot: the default backend looks for a display.
import matplotlib.pyplot as plt
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

INK, BLUE, ORANGE, GREY, PALE, LINE = "#111827", "#2563eb", "#ea580c", "#9ca3af", "#93c5fd", "#e5e7eb"
PURPLE, GREEN = "#7c3aed", "#0d9488"
# Charts are drawn in these colours, and written with names, so that the page can change them in dark mode.
_NAMED = {
    INK: "currentColor",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREY: "var(--grey)",
    PALE: "var(--pale)",
    LINE: "var(--line)",
    PURPLE: "var(--purple)",
    GREEN: "var(--green)",
}
_ANY_NAMED = re.compile("|".join(_NAMED))
# With fixed ids and no date, the same data gives the same bytes.
matplotlib.rc("svg", hashsalt="report", fonttype="none")
matplotlib.rc("font", family="sans-serif", size=9)
matplotlib.rc("axes", axisbelow=True, labelcolor=INK, edgecolor=INK)
matplotlib.rc("axes.spines", top=False, right=False)
matplotlib.rc("xtick", color=INK)
matplotlib.rc("ytick", color=INK)
matplotlib.rc("text", color=INK)
matplotlib.rc("grid", color=LINE)
# For the base model, the trained models and the model in production.
_COLOURS = (GREY, PALE, BLUE, ORANGE)

# Fits the screen of a phone without scaling. Two charts fit beside each other on a wide screen.
NARROW_INCHES = 4.2

_PAGE = Environment(autoescape=True, loader=FileSystemLoader(Path(__file__).parent)).get_template("page.html")


class Verdict(NamedTuple):
    """The result that a page opens with: a few words, and the colour that they are shown in."""

    words: str
    state: Literal["good", "bad", "mixed"]


def page(
    title: str,
    lead: str | Sequence[str],
    sections: Sequence[tuple[str, Markup]],
    *,
    facts: Mapping[str, str] | None = None,
    verdict: Verdict | None = None,
    sample: Markup | None = None,
    refresh: int | None = None,
) -> str:
    """A whole HTML page.

    Args:
        lead: the result in at most three sentences.
        sections: headings and bodies: charts first, then tables. A section with an empty body is not shown.
        facts: what the page is about, e.g. `{"Model": "handbook", "Version": "3"}`. Empty values are not shown.
        sample: one example, shown before the sections.
        refresh: seconds after which the browser loads the page again; None for a page that does not change.
    """
    return _PAGE.render(
        title=title,
        lead=[lead] if isinstance(lead, str) else lead,
        sections=[section for section in sections if section[1]],
        facts={name: value for name, value in (facts or {}).items() if value},
        verdict=verdict,
        sample=sample,
        refresh=refresh,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table with numbers aligned right, and floats rounded to four significant digits; empty without rows."""
    if not rows:
        return Markup("")
    right = [' class="n"' if isinstance(value, int | float) else "" for value in rows[0]]
    cells = "".join(f"<th{css}>{escape(name)}</th>" for name, css in zip(head, right, strict=True))
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return Markup(f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>')  # noqa: S704


def paragraph(text: str, css: str = "") -> Markup:
    """One paragraph of plain text."""
    return Markup('<p class="{}">{}</p>').format(css, text)


def details(summary: str, body: Markup) -> Markup:
    """A part that is closed until its summary is clicked."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def marked(name: str, right: bool) -> Markup:
    """A name with a green tick or a red cross."""
    css, sign = ("good", "✓") if right else ("bad", "✗")
    return Markup('<span class="mark {}">{} {}</span>').format(css, sign, name)


def funnel(counts: Mapping[str, int]) -> Markup:
    """A bar for each number, the longest for the largest."""
    most = max(1, *counts.values())
    rows = Markup("").join(
        Markup('<div>{}</div><div class="n">{}</div><div class="bar"><i style="width:{:.1f}%"></i></div>').format(
            name, f"{count:,}", 100 * count / most
        )
        for name, count in counts.items()
    )
    return Markup('<div class="funnel">{}</div>').format(rows)


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """A chart with one line for each name, from (x, y) points."""
    figure, axes = plt.subplots(figsize=(NARROW_INCHES, 2.6))
    for (name, points), colour in zip(series.items(), cycle((BLUE, ORANGE, GREY, GREEN, PURPLE, PALE))):
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, label=name, color=colour, marker="o" if len(points) < 30 else "", markersize=3)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y")
    if all(x == int(x) for points in series.values() for x, _ in points):
        # Steps and trials are counted.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    return _svg(figure)


def interval_bars(values: Mapping[str, tuple[float, float | None, float | None]], x_label: str) -> Markup:
    """A chart with one bar for each name, from `(value, low, high)`, with a whisker over the interval if there is one.

    A value that is not finite has no bar, only its text.
    """
    figure, axes = plt.subplots(figsize=(NARROW_INCHES, 0.75 + 0.3 * len(values)))
    for row, (value, low, high) in enumerate(values.values()):
        axes.barh(row, value if math.isfinite(value) else 0, height=0.6, color=_COLOURS[row % len(_COLOURS)])
        if low is not None and high is not None and math.isfinite(high - low):
            axes.plot([low, high], [row, row], color=INK, linewidth=1.5, marker="|", markersize=8)
        text = interval(value, low, high)
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="x")
    if not any(value for value, _, _ in values.values()):
        axes.set_xlim(0, 1)
    return _svg(figure)


def interval(value: float, low: float | None, high: float | None, sign: bool = False) -> str:
    """A value with its interval, rounded to two digits of the interval's width: `2.82 [2.74, 2.89]`.

    With `sign`, positive numbers have a plus sign.
    """
    if low is None or high is None:
        return f"{value:{'+' if sign else ''}.3g}"
    width = high - low
    # Means of equal values differ by rounding errors, and their width has no digits to show.
    places = max(0, 1 - math.floor(math.log10(width))) if width > 1e-9 and math.isfinite(width) else 2

    def shown(number: float) -> str:
        return f"{number:{'+' if sign and number > 0 else ''}.{places}f}"

    return f"{shown(value)} [{shown(low)}, {shown(high)}]"


def estimated(estimate: Mapping[str, Any], sign: bool = False) -> str:
    """The value of an estimate of the evaluation report, with its interval; see `interval`."""
    return interval(estimate["value"], estimate["low"], estimate["high"], sign)


def cards(items: Sequence[tuple[str | Markup, Markup]], css: str = "cards") -> Markup:
    """Boxes with headings, in as many columns as fit; with the css `stack`, each box below the one before."""
    boxes = Markup("").join(Markup('<div class="card"><h3>{}</h3>{}</div>').format(head, body) for head, body in items)
    return Markup('<div class="{}">{}</div>').format(css, boxes)


def histogram(counts: Mapping[int, int], x_label: str, limit: int | None = None) -> Markup:
    """A histogram of whole numbers, given as `{value: count}`, with a line at `limit`. The axis ends with the data."""
    if not counts:
        return Markup("")
    low, high = min(counts), max(counts)
    width = max(1, math.ceil((high - low + 1) / 40))
    figure, axes = plt.subplots(figsize=(NARROW_INCHES, 2.3))
    edges = [low - 0.5 + width * number for number in range((high - low) // width + 2)]
    axes.hist(list(counts), bins=edges, weights=list(counts.values()), color=BLUE)
    if limit is not None and limit <= 1.2 * high:
        axes.axvline(limit, color=ORANGE, linestyle="--", label=f"limit {limit:,}")
        axes.legend(frameon=False)
    elif limit is not None:
        x_label += f" (the limit is {limit:,})"
    axes.set(xlabel=x_label, ylabel="rows")
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return _svg(figure)


def write_report(folder: Path, data: Mapping[str, Any], html_page: str) -> None:
    """Write `report.json` for machines and `report.html` for people."""
    write_json(folder, data)
    write_page(folder, html_page)


def write_json(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `report.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(data, indent=2), encoding="utf-8")


def write_page(folder: Path, html_page: str) -> None:
    """Write `report.html`."""
    (folder / "report.html").write_text(html_page, encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{escape(value)}</td>"


def _svg(figure: Any) -> Markup:
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(_ANY_NAMED.sub(lambda found: _NAMED[found[0]], text[text.index("<svg") :]))  # noqa: S704
