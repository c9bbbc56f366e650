"""Static HTML reports: no script, because the dashboard shows them in a sandboxed frame; charts are inline SVG."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # Before pyplot: the default backend looks for a display.
import matplotlib.pyplot as plt
from jinja2 import Environment
from markupsafe import Markup

# Fixed ids and no date: the same data gives the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"})
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"

_PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#111827;background:#fff;margin:0 auto;padding:1rem;max-width:60rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
.wide{overflow-x:auto}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #e5e7eb;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}p.lead{font-size:1.1rem}
.tokens{font:13px/2 ui-monospace,monospace;word-break:break-word}.tokens span{padding:.15em 0;border-radius:2px}
.t{background:#bbf7d0}.m{background:#f3f4f6;color:#6b7280}.e{background:#16a34a;color:#fff;font-weight:bold}
.warn{background:#fef3c7;padding:.5rem .75rem;border-left:4px solid #f59e0b}pre{white-space:pre-wrap}
</style></head><body><h1>{{ title }}</h1><p class="lead">{{ lead }}</p>
{% for heading, body in sections %}<h2>{{ heading }}</h2>{{ body }}{% endfor %}</body></html>
""")


def page(title: str, lead: str, sections: Sequence[tuple[str, Markup]]) -> str:
    """A whole HTML page: title, one leading sentence, and headed sections."""
    return _PAGE.render(title=title, lead=lead, sections=sections)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table; numbers are set right, floats with four significant digits."""
    first = rows[0] if rows else [""] * len(head)
    right = [' class="n"' if isinstance(value, int | float) else "" for value in first]
    cells = "".join(f"<th{css}>{html.escape(name)}</th>" for name, css in zip(head, right, strict=True))
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return Markup(f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>')  # noqa: S704


def paragraph(text: str, css: str = "") -> Markup:
    """One paragraph of plain text."""
    return Markup('<p class="{}">{}</p>').format(css, text)


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """Lines by name, each a sequence of (x, y)."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for (name, points), colour in zip(series.items(), (BLUE, ORANGE, GREY), strict=False):
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, label=name, color=colour, marker="o" if len(points) < 30 else "", markersize=3)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(frameon=False)
    return _svg(figure)


def histogram(counts: Mapping[int, int], x_label: str, limit: float | None = None) -> Markup:
    """A histogram of values counted by value, with a line at `limit`."""
    figure, axes = plt.subplots(figsize=(7, 2.5))
    bins = min(40, max(5, len(counts)))
    axes.hist(list(counts), bins=bins, weights=list(counts.values()), color=BLUE)
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linestyle="--", label=f"limit {limit:g}")
        axes.legend(frameon=False)
    axes.set(xlabel=x_label, ylabel="rows")
    return _svg(figure)


def label_view(tokens: Sequence[tuple[str, bool]], end_of_turn: str) -> Markup:
    """Each token of a row: trained (green), the trained end of turn (dark green), or masked (grey)."""
    spans = []
    for text, trained in tokens:
        css = ("e" if text == end_of_turn else "t") if trained else "m"
        shown = html.escape(text).replace("\n", "⏎<br>")
        spans.append(f'<span class="{css}">{shown}</span>')
    return Markup(f'<p class="tokens">{"".join(spans)}</p>')  # noqa: S704


def write_report(folder: Path, data: Mapping[str, Any], html_page: str) -> None:
    """Write `report.json` for machines and `report.html` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
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
