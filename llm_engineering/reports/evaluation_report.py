"""The evaluation report for people: what is better, how sure that is, and the answers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from llm_engineering.evaluation.incumbent import INCUMBENT
from llm_engineering.evaluation.statistics import verdict
from llm_engineering.reports.page import (
    NARROW_INCHES,
    cards,
    interval,
    interval_bars,
    line_chart,
    page,
    paragraph,
    table,
)

Report = Mapping[str, Any]
_BETTER = {"lower": "lower is better", "higher": "higher is better", None: "neither way is better"}
_NAMES = {"base": "the base model", "sft": "the SFT model", "dpo": "the DPO model", INCUMBENT: "the one in production"}


def evaluation_page(data: Report, training: Report | None) -> str:
    """The whole page.

    Args:
        data: the JSON report.
        training: the training report of the newest model, if it is at hand.
    """
    newest = data["newest"]
    others = [name for name in data["models"] if name not in (newest, INCUMBENT)]
    sections = [(f"{newest} against {name}", _differences(data, name)) for name in others]
    has_incumbent = INCUMBENT in data["models"]
    changed = _differences(data, INCUMBENT) if has_incumbent else paragraph("No model in production was measured here.")
    sections.insert(0, ("What changed since the last promoted run", changed))
    sections.append(("Measures", _measures(data)))
    if training is not None:
        sections.append((f"Training of {training['stage']}", _curves(training)))
    if data["judge"] is not None:
        sections.append(("Judge", _judge(data["judge"])))
    if data["checks"] is not None:
        sections.append(("Own checks", _checks(data["checks"], data["models"])))
    if data["lm_eval"] is not None:
        sections.append(("lm-eval", _lm_eval(data["lm_eval"])))
    sections.append(("Answers", _answers(data)))
    return page("Evaluation report", _lead(data), sections)


def _lead(data: Report) -> str:
    loss = data["measures"]["heldout_loss"]
    newest = data["newest"]
    against = INCUMBENT if INCUMBENT in data["models"] else "base"
    found = loss["differences"][f"{newest}-{against}"]
    said = verdict(found, loss["better"])
    result = f"is {said} than" if said in ("better", "worse") else "cannot be told apart from"
    pairs = f" and {data['heldout_pairs']} pairs" if data["heldout_pairs"] else ""
    return (
        f"On {data['heldout_rows']} held-out rows{pairs}, {_NAMES.get(newest, newest)} {result} {_NAMES[against]} by its "
        f"loss: {interval(found['value'], found['low'], found['high'], sign=True)} nats a token."
    )


def _differences(data: Report, other: str) -> Markup:
    """What the newest model does otherwise than another, measure by measure."""
    rows = []
    for measure in data["measures"].values():
        found = measure["differences"].get(f"{data['newest']}-{other}")
        if found is not None:
            shown = interval(found["value"], found["low"], found["high"], sign=True)
            rows.append((measure["title"], shown, verdict(found, measure["better"]), str(found["n"])))
    return table(["Measure", f"{data['newest']} minus {other}", "That is", "Rows"], rows)


def _measures(data: Report) -> Markup:
    note = (
        f"Whiskers and brackets are {data['confidence']:.0%} bootstrap intervals over rows ({data['bootstrap_samples']} "
        "resamples); those of differences draw the same rows for both models. An interval of no width says that all rows "
        "came out alike, not that all others would."
    )
    if data["left_out"]:
        note += (
            f" {data['left_out']} more rows or pairs are left out, because the tokenizer of the model in production cannot "
            "render them."
        )
    charts = [
        (
            measure["title"],
            Markup("{}{}").format(
                paragraph(_BETTER[measure["better"]], "small"),
                interval_bars(
                    {n: (e["value"], e["low"], e["high"]) for n, e in measure["models"].items()}, measure["unit"]
                ),
            ),
        )
        for measure in data["measures"].values()
    ]
    return paragraph(note, "small") + cards(charts)


def _curves(training: Report) -> Markup:
    history = training["history"]

    def curve(name: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name]) for entry in history if name in entry]

    def chart(name: str, label: str) -> Markup:
        return line_chart({"training": curve(name), "validation": curve(f"eval_{name}")}, "step", label, NARROW_INCHES)

    charts = [("Loss", chart("loss", "loss"))]
    if curve("rewards/margins"):
        charts.append(("Reward margin, chosen minus rejected", chart("rewards/margins", "margin")))
    return cards(charts)


def _judge(found: Report) -> Markup:
    rows = [
        (
            name,
            interval(duel["win_rate"]["value"], duel["win_rate"]["low"], duel["win_rate"]["high"]),
            *duel["verdicts"].values(),
            f"{duel['agreement']:.0%}",
        )
        for name, duel in found["duels"].items()
    ]
    note = (
        f"By {found['model']} at temperature 0, prompt {found['prompt_hash']}. Every row is judged in both orders; a tie, "
        "and a verdict that cannot be read, is half a win. Agreement is the share of rows whose orders have the same verdict."
    )
    head = ["Duel", "Share won by the first", "Won", "Tie", "Unparsable", "Lost", "Agreement of the orders"]
    return paragraph(note, "small") + table(head, rows)


def _checks(found: Report, models: list[str]) -> Markup:
    rows = [
        (row["prompt"], *("; ".join(row["answers"][name]["failures"]) or "passed" for name in models))
        for row in found["rows"]
    ]
    passed = ", ".join(f"{name} {count} of {found['prompts']}" for name, count in found["passed"].items())
    return paragraph(f"Passed: {passed}.") + table(["Prompt", *models], rows)


def _lm_eval(found: Report) -> Markup:
    scores = found["scores"]
    models = list(scores)
    rows = [
        (task, metric, *(scores[name][task][metric] for name in models))
        for task, metrics in scores[models[0]].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    limit = f", the first {found['limit']} rows of each task" if found["limit"] else ""
    few = "" if found["num_fewshot"] is None else f", {found['num_fewshot']} shots"
    asked = "with" if found["apply_chat_template"] else "without"
    return paragraph(f"lm-eval {found['version']}{limit}{few}, {asked} the chat template.", "small") + table(
        ["Task", "Metric", *models], rows
    )


def _answers(data: Report) -> Markup:
    note = f"The first {len(data['samples'])} of {data['generated_rows']} rows drawn with seed {data['seed']}; greedy."
    blocks = [
        Markup("<p><strong>{}. {}</strong></p>{}").format(
            number,
            sample["prompt"],
            cards(
                [
                    ("reference", paragraph(sample["reference"])),
                    *((name, _answer(sample["answers"][name])) for name in data["models"]),
                ],
                "answers",
            ),
        )
        for number, sample in enumerate(data["samples"], 1)
    ]
    return paragraph(note, "small") + Markup("").join(blocks)


def _answer(answer: Report) -> Markup:
    end = "" if answer["stopped"] else "cut at the budget"
    return paragraph(answer["text"] or "(empty)") + paragraph(end, "small")
