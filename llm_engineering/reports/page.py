"""Parts of static HTML reports. They have no scripts, because the dashboard sandboxes them; charts are inline SVG."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # Before pyplot: the default backend looks for a display.
import matplotlib.pyplot as plt
from jinja2 import Environment
from markupsafe import Markup

# With fixed ids and no date, the same data gives the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"})
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"
# For the base model, the trained models and the model in production.
_COLOURS = (GREY, "#93c5fd", BLUE, ORANGE)

# Fits the screen of a phone without scaling.
NARROW_INCHES = 4.2

_PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#111827;background:#fff;margin:0 auto;padding:1rem;max-width:60rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
.wide{overflow-x:auto}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #e5e7eb;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}p.lead{font-size:1.1rem}
.tokens{font:13px/2 ui-monospace,monospace;word-break:break-word}.tokens span{padding:.15em 0;border-radius:2px}
.t{background:#bbf7d0}.m{background:#f3f4f6;color:#6b7280}.e{background:#16a34a;color:#fff;font-weight:bold}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.cards>*{min-width:0}.card{border:1px solid #e5e7eb;border-radius:6px;padding:.5rem .75rem;overflow-wrap:anywhere}
.card h3{font-size:.95rem;margin:.1rem 0 .3rem}.card p{margin:.2rem 0;white-space:pre-wrap}.small{color:#4b5563;font-size:.85rem}
.answers{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,10.5rem),1fr));margin-bottom:1.5rem}.answers .card{font-size:.9rem}
.warn{background:#fef3c7;padding:.5rem .75rem;border-left:4px solid #f59e0b}pre{white-space:pre-wrap}
@media(max-width:30rem){table{font-size:.85rem}th,td{padding:.25rem .35rem}}
</style></head><body><h1>{{ title }}</h1><p class="lead">{{ lead }}</p>
{% for heading, body in sections %}<h2>{{ heading }}</h2>{{ body }}{% endfor %}</body></html>
""")


def page(title: str, lead: str, sections: Sequence[tuple[str, Markup]]) -> str:
    """A whole HTML page: a title, a lead sentence, and sections with headings."""
    return _PAGE.render(title=title, lead=lead, sections=sections)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table with numbers aligned right, and floats rounded to four significant digits."""
    first = rows[0] if rows else [""] * len(head)
    right = [' class="n"' if isinstance(value, int | float) else "" for value in first]
    cells = "".join(f"<th{css}>{html.escape(name)}</th>" for name, css in zip(head, right, strict=True))
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return Markup(f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>')  # noqa: S704


def paragraph(text: str, css: str = "") -> Markup:
    """One paragraph of plain text."""
    return Markup('<p class="{}">{}</p>').format(css, text)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, width: float = 7
) -> Markup:
    """A chart with one line for each name, from (x, y) points; `width` is in inches."""
    figure, axes = plt.subplots(figsize=(width, 3))
    for (name, points), colour in zip(series.items(), (BLUE, ORANGE, GREY), strict=False):
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, label=name, color=colour, marker="o" if len(points) < 30 else "", markersize=3)
    axes.set(xlabel=x_label, ylabel=y_label)
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
            axes.plot([low, high], [row, row], color="#111827", linewidth=1.5, marker="|", markersize=8)
        text = interval(value, low, high)
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.axvline(0, color="#111827", linewidth=0.8)
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
    places = max(0, 1 - math.floor(math.log10(width))) if width > 0 and math.isfinite(width) else 2

    def shown(number: float) -> str:
        return f"{number:{'+' if sign and number > 0 else ''}.{places}f}"

    return f"{shown(value)} [{shown(low)}, {shown(high)}]"


def cards(items: Sequence[tuple[str, Markup]], css: str = "cards") -> Markup:
    """Boxes with headings, in as many columns as fit. `css` is `cards` or the narrower `answers`."""
    boxes = Markup("").join(Markup('<div class="card"><h3>{}</h3>{}</div>').format(head, body) for head, body in items)
    return Markup('<div class="{}">{}</div>').format(css, boxes)


def histogram(counts: Mapping[int, int], x_label: str, limit: float | None = None) -> Markup:
    """A histogram of values, given as `{value: count}`, with a line at `limit`."""
    figure, axes = plt.subplots(figsize=(7, 2.5))
    bins = min(40, max(5, len(counts)))
    axes.hist(list(counts), bins=bins, weights=list(counts.values()), color=BLUE)
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linestyle="--", label=f"limit {limit:g}")
        axes.legend(frameon=False)
    axes.set(xlabel=x_label, ylabel="rows")
    return _svg(figure)


def write_report(folder: Path, data: Mapping[str, Any], html_page: str) -> None:
    """Write `report.json` for machines and `report.html` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
    write_page(folder, html_page)


def write_page(folder: Path, html_page: str) -> None:
    """Write `report.html`."""
    (folder / "report.html").write_text(html_page, encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _svg(figure: Any) -> Markup:
    for side in ("top", "right"):
        figure.axes[0].spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # noqa: S704
