"""The report of a sweep: its trials, what their best shows, and the measures of the winner on the test split."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from llm_engineering.evaluation.selection import CONFIDENCE
from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.reports.page import Verdict, cards, estimated, line_chart, page, paragraph, table

Report = Mapping[str, Any]
# Curves of the best trials beside the winner's and that of the recipe's own values.
_MORE_CURVES = 2


def sentences(report: Report) -> list[str]:
    """What the sweep shows: the winner, the recipe's own values, and how much of the lead is chance."""
    counts, winner, chance, own = report["counts"], report["winner"], report["chance"], report["own"]
    begun = sum(counts.values())
    ended = f"{counts['complete']} ended, {counts['stopped']} were stopped early, {counts['failed']} failed"
    found = [
        f"Of {counted(begun, 'trial')} ({ended}), trial {winner['number']} has the lowest validation loss of {report['stage']}: "
        f"{winner['loss']:.4f}."
    ]
    if own["loss"] is not None and own["values"] != winner["values"]:
        found[0] += f" With the recipe's own values it is {own['loss']:.4f}."
    found.append(
        f"With {chance['repeats']} other seeds, the winner's recipe has a loss of {chance['mean']:.4f} on average, with a standard "
        f"deviation of {chance['spread']:.4f}. Expect this loss and not the winner's: it was not selected."
    )
    found.append(
        f"The lowest of {chance['trials']} runs of this one recipe, which differ in nothing but the seed, would by chance be about "
        f"{chance['lowest']:.4f}, {chance['mean'] - chance['lowest']:.4f} below their mean."
    )
    if own["loss"] is not None and own["values"] != winner["values"]:
        place = (
            "above this, so the winner is better"
            if _is_better(report)
            else "not above this, so the difference may be chance"
        )
        found.append(
            f"With {CONFIDENCE:.0%} confidence one more run of the winner's recipe has a loss from {chance['low']:.4f} to "
            f"{chance['high']:.4f}. The loss with the recipe's own values is {place}."
        )
    return found


def sweep_page(report: Report) -> str:
    """The whole page."""
    charts = [
        ("In their order", line_chart(_by_trial(report), "trial", "validation loss")),
        ("During training", line_chart(_curves(report), "share of training", "validation loss")),
    ]
    facts = {
        "Sweep": report["sweep"],
        "Stage": report["stage"],
        "Trials": str(len(report["trials"])),
        "Winner": report["version"],
    }
    sections = [
        ("Validation loss of the trials", cards(charts)),
        ("The winner on the test split", _measures(report)),
        ("All trials, the best first", _trials(report)),
        ("Ranges", table(["Key", "Values", "In the recipe"], _ranges(report))),
        ("How chance is measured", _chance_note()),
    ]
    return page(f"Sweep of {report['stage']}", sentences(report), sections, facts=facts, verdict=_verdict(report))


def _verdict(report: Report) -> Verdict | None:
    """Whether the winner is better than the recipe; None without a trial with the recipe's own values."""
    own = report["own"]
    if own["loss"] is None:
        return None
    if own["values"] == report["winner"]["values"]:
        return Verdict("No trial is better than the recipe's own values", "mixed")
    if _is_better(report):
        return Verdict("The winner is better than the recipe's own values", "good")
    return Verdict("The winner's lead may be chance", "mixed")


def _is_better(report: Report) -> bool:
    """Whether the loss with the recipe's own values is above those of the winner's recipe with other seeds."""
    better: bool = report["own"]["loss"] > report["chance"]["high"]
    return better


def _chance_note() -> Markup:
    note = (
        "The standard deviation is that of the seeds. The lowest of n equal runs lies E(n) of it below their mean on average, where "
        "E(n) is the mean of the largest of n standard normal values (Tippett 1925). The interval of one more run is Student's "
        "prediction interval from the repeats."
    )
    return paragraph(note, "small")


def _measures(report: Report) -> Markup:
    """The measures of the evaluation, which no trial took part in."""
    evaluation = report["evaluation"]
    newest = evaluation["newest"]
    rows = []
    for measure in evaluation["measures"].values():
        difference = measure["differences"][f"{newest}-base"]
        shown = estimated(difference, sign=True)
        value = measure["models"][newest]["value"]
        rows.append((measure["title"], float(value), shown, verdict(difference, measure["better"])))
    note = f"Only the winner was measured on the test split, once, as {report['version']}. {report['gate']}"
    command = f"This command trains it without the sweep: {shlex.join(report['command'])}"
    return (
        paragraph(note)
        + table(["Measure", newest, f"{newest} minus base", "Verdict"], rows)
        + paragraph(command, "small")
    )


def _by_trial(report: Report) -> dict[str, list[tuple[float, float]]]:
    ended = [(float(trial["number"]), trial["loss"]) for trial in report["trials"] if trial["loss"] is not None]
    lowest = [(number, min(loss for _, loss in ended[: place + 1])) for place, (number, _) in enumerate(ended)]
    stopped = [(float(t["number"]), t["curve"][-1][1]) for t in report["trials"] if t["state"] == "stopped"]
    return {"lowest so far": lowest, "trial": ended, "stopped early": stopped}


def _curves(report: Report) -> dict[str, list[tuple[float, float]]]:
    """The curves of the winner, of the recipe's own values, and of the next best trials."""
    ranked = sorted((t for t in report["trials"] if t["loss"] is not None), key=lambda trial: trial["loss"])
    own = [trial for trial in ranked if trial["values"] == report["own"]["values"]]
    shown = {trial["number"]: trial for trial in (*ranked[:1], *own[:1], *ranked[1 : 1 + _MORE_CURVES])}
    names = {number: f"trial {number}" for number in shown}
    names |= {trial["number"]: f"trial {trial['number']} (the recipe's own values)" for trial in own[:1]}
    names[ranked[0]["number"]] += " (winner)"
    return {names[number]: [tuple(point) for point in trial["curve"]] for number, trial in shown.items()}


def _trials(report: Report) -> Markup:
    keys = list(report["ranges"])
    rows = [
        (
            str(trial["number"]),
            *(shown_value(trial["values"].get(key)) for key in keys),
            *_ended(trial),
        )
        for trial in sorted(report["trials"], key=lambda trial: (trial["loss"] is None, trial["loss"]))
    ]
    note = f"The runs of ZenML have the names {report['sweep']}-trial-N, where N is the number of the trial."
    return table(["Trial", *keys, "Validation loss", "State"], rows) + paragraph(note, "small")


def _ended(trial: Report) -> tuple[str, str]:
    """The validation loss of a trial, with the share of training where it was stopped, and its state."""
    if trial["state"] == "stopped":
        share, loss = trial["curve"][-1]
        return f"{loss:.4f} at {share:.0%}", "stopped"
    if trial["state"] == "failed":
        return "", f"failed: {trial['reason']}"
    return f"{trial['loss']:.4f}", "complete"


def shown_value(value: Any) -> str:
    """A value as a table shows it; empty for None."""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _ranges(report: Report) -> list[tuple[str, str, str]]:
    rows = []
    for key, values in report["ranges"].items():
        if "choices" in values:
            shown = ", ".join(map(str, values["choices"]))
        else:
            scale = ", evenly over orders of magnitude" if values.get("log") else ""
            step = f", in steps of {values['step']}" if values.get("step") else ""
            shown = f"{values['low']} to {values['high']}{step}{scale}"
        rows.append((key, shown, shown_value(report["own"]["values"][key])))
    return rows
