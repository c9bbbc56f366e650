"""The training report: curves, settings, and a few rows token by token with their labels."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import yaml
from markupsafe import Markup

from llm_engineering.progress import counted
from llm_engineering.reports.page import Verdict, cards, details, line_chart, page, paragraph, table

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


def training_page(
    summary: Mapping[str, Any], facts: Mapping[str, str] | None = None, setup: Mapping[str, Any] | None = None
) -> str:
    """The page of one stage.

    Args:
        summary: the JSON summary that training writes.
        facts: of the run, for the head of the page.
        setup: what all stages of the recipe share, as plain values.
    """
    history, stage = summary["history"], summary["stage"]
    labels = [_label_view(row, summary["end_token"]) for row in summary["labels"]]
    end = summary["end_token"]
    legend = f"Green tokens are trained, dark green is the trained end of turn ({end}), grey tokens are masked."
    recipe = yaml.safe_dump({**(setup or {}), stage: summary["config"]}, sort_keys=False, allow_unicode=True)
    device = {**summary["device"], **{key: summary[key] for key in ("effective_batch", "num_processes")}}
    seconds = [(part, round(value, 1)) for part, value in summary.get("seconds", {}).items()]
    shown = _completions(summary["completions"]) if "completions" in summary else Markup("")
    sections = [
        ("Curves", cards(all_charts(history))),
        (
            "Which tokens are trained",
            paragraph(legend, "small") + Markup("").join(labels[1:]) if labels[1:] else Markup(""),
        ),
        ("Completions", shown),
        ("Seconds", table(["Kind of work", "Seconds"], seconds)),
        ("Machine", table(["Key", "Value"], [(key, str(value)) for key, value in device.items()])),
        ("Choices made for this machine", table(["Choice: reason"], [(line,) for line in summary["device_reasons"]])),
        ("Recipe", details(f"{stage} and its setup, as YAML", Markup("<pre>{}</pre>").format(recipe))),
    ]
    verdict, said = outcome(history, bool(summary["config"].get("load_best")))
    lead = [said, f"{counted(summary['steps'], 'step')}; the last training loss is {summary['train_loss']:.3f}."]
    first = paragraph("One row, token by token. " + legend, "small") + labels[0] if labels else None
    return page(f"Training report: {stage.upper()}", lead, sections, facts=facts, verdict=verdict, sample=first)


def outcome(history: Sequence[Mapping[str, float]], load_best: bool) -> tuple[Verdict | None, str]:
    """The verdict of the validation, and its best and last value in a sentence.

    The training loss is no verdict: it falls while a model learns the rows by heart.

    Args:
        load_best: whether the model with the best validation is kept, instead of the last one.
    """
    rewarded = bool(_curve(history, "eval_reward"))
    name, curve = ("reward", _curve(history, "eval_reward")) if rewarded else ("loss", _curve(history, "eval_loss"))
    if not curve:
        return None, "Nothing was measured on validation rows."
    best_step, best = (max if rewarded else min)(curve, key=itemgetter(1))
    last_step, last = curve[-1]
    kept = f" The model is that of step {best_step:g}." if load_best else ""
    if best == last:
        said = f"The last validation {name}, in step {last_step:g}, is also the best: {last:.3f}."
        return Verdict(f"The validation {name} is best at the end", "good"), said
    said = f"The best validation {name} is {best:.3f}, in step {best_step:g}; the last is {last:.3f}, in step {last_step:g}.{kept}"
    return Verdict(
        f"The validation {name} became worse after step {best_step:g}", "good" if load_best else "mixed"
    ), said


def all_charts(history: Sequence[Mapping[str, float]]) -> list[tuple[str, Markup]]:
    """The charts of `training_charts`, and those of the learning rate and the speed."""
    rate, speed = _curve(history, "learning_rate"), _curve(history, "tokens_per_second")
    return [
        *training_charts(history),
        ("Learning rate", line_chart({"training": rate}, "step", "learning rate")),
        ("Speed", line_chart({"training": speed}, "step", "tokens a second, without padding")),
    ]


def training_charts(history: Sequence[Mapping[str, float]]) -> list[tuple[str, Markup]]:
    """Charts of the loss, and of what else a stage measures, with their headings."""
    measures = [("loss", "Loss", "loss")]
    measures += [measure for measure in _MORE if _curve(history, measure[0])]
    charts = []
    for key, title, label in measures:
        curves = {"training": _curve(history, key), "validation": _curve(history, f"eval_{key}")}
        charts.append((title, line_chart(curves, "step", label)))
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


def _label_view(tokens: Sequence[tuple[str, bool]], end_token: str) -> Markup:
    spans = []
    for text, is_trained in tokens:
        css = ("e" if text == end_token else "t") if is_trained else "m"
        shown = html.escape(text).replace("\n", "⏎<br>")
        spans.append(f'<span class="{css}">{shown}</span>')
    return Markup(f'<p class="tokens">{"".join(spans)}</p>')  # noqa: S704
