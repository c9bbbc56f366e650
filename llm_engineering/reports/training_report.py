"""The training report: curves, settings, and a few rows token by token with their labels."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llm_engineering.progress import counted
from llm_engineering.reports.page import line_chart, page, paragraph, table

# Beside the loss: key in the history, heading, label of the axis.
_MORE = [
    ("accuracy", "Pairs whose chosen answer has the higher reward", "share"),
    ("rewards/margins", "Reward margin (chosen minus rejected)", "margin"),
    ("reward", "Reward", "mean weighted sum"),
    ("frac_reward_zero_std", "Prompts whose completions all have the same reward", "share"),
    ("kl", "Divergence (KL) from the start", "nats a token"),
    ("entropy", "Entropy", "nats a token"),
    ("completions/mean_length", "Length of completions", "tokens"),
    ("completions/clipped_ratio", "Completions without an end", "share"),
]


def training_page(summary: Mapping[str, Any]) -> str:
    """The page of one stage, from the JSON summary that training writes."""
    history = summary["history"]
    rate = {"learning rate": _curve(history, "learning_rate")}
    speed = {"training": _curve(history, "tokens_per_second")}
    facts = {**summary["device"], **summary["config"], **{k: summary[k] for k in ("effective_batch", "num_processes")}}
    sections = [
        *training_charts(history),
        ("Learning rate", line_chart(rate, "step", "learning rate")),
        ("Speed", line_chart(speed, "step", "tokens per second, without padding")),
        *(
            [("Which tokens are trained", _labels(summary["labels"], summary["end_token"]))]
            if summary["labels"]
            else []
        ),
        *([("Completions", _completions(summary["completions"]))] if "completions" in summary else []),
        ("Settings", table(["Key", "Value"], [(key, str(value)) for key, value in facts.items()])),
        ("Choices made for this machine", table(["Choice: reason"], [(line,) for line in summary["device_reasons"]])),
    ]
    lead = f"{counted(summary['steps'], 'step')}, last training loss {summary['train_loss']:.3f}"
    return page(f"Training report: {summary['stage'].upper()}", lead, sections)


def training_charts(history: Sequence[Mapping[str, float]], width: float = 7) -> list[tuple[str, Markup]]:
    """Charts of the loss, and of what else a stage measures, with their headings; `width` is in inches."""
    measures = [("loss", "Loss", "loss")]
    measures += [measure for measure in _MORE if _curve(history, measure[0])]
    charts = []
    for key, title, label in measures:
        curves = {"training": _curve(history, key), "validation": _curve(history, f"eval_{key}")}
        charts.append((title, line_chart(curves, "step", label, width)))
    return charts


def _curve(history: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def _completions(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Completions of the first and of the last generation step, with their rewards."""
    rows = [
        (
            str(row["step"]),
            row["prompt"],
            row["completion"],
            f"{row['tokens']}{'' if row['stopped'] else ', cut'}",
            ", ".join(f"{name} {value:.3g}" for name, value in row["rewards"].items()),
        )
        for part in ("first", "last")
        for row in shown.get(part, ())
    ]
    return table(["Step", "Prompt", "Completion", "Tokens", "Rewards"], rows)


def _labels(rows: Sequence[Sequence[tuple[str, bool]]], end_token: str) -> Markup:
    """Rows as `label_views` makes them, each token coloured by its label, with a legend."""
    legend = f"Green tokens are trained, dark green is the trained end of turn ({end_token}), grey tokens are masked."
    return paragraph(legend) + Markup("").join(_label_view(row, end_token) for row in rows)


def _label_view(tokens: Sequence[tuple[str, bool]], end_token: str) -> Markup:
    spans = []
    for text, is_trained in tokens:
        css = ("e" if text == end_token else "t") if is_trained else "m"
        shown = html.escape(text).replace("\n", "⏎<br>")
        spans.append(f'<span class="{css}">{shown}</span>')
    return Markup(f'<p class="tokens">{"".join(spans)}</p>')  # noqa: S704
