"""The training report: curves, settings, and the labels token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llm_engineering.reports.page import label_view, line_chart, page, paragraph, table


def training_page(summary: Mapping[str, Any]) -> str:
    """The page of a run, from the summary that training leaves as JSON."""
    history = summary["history"]

    def curve(name: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name]) for entry in history if name in entry]

    sections = [("Loss", line_chart({"training": curve("loss"), "validation": curve("eval_loss")}, "step", "loss"))]
    if curve("rewards/margins"):
        margins = {"training": curve("rewards/margins"), "validation": curve("eval_rewards/margins")}
        sections.append(("Reward margin, chosen minus rejected", line_chart(margins, "step", "margin")))
    sections.append(("Learning rate", line_chart({"learning rate": curve("learning_rate")}, "step", "learning rate")))
    sections.append(("Speed", line_chart({"training": curve("tokens_per_second")}, "step", "real tokens a second")))
    sections.append(("Labels", label_section(summary["labels"], summary["end_token"])))
    sizes = {name: summary[name] for name in ("effective_batch", "num_processes")}
    facts = {**summary["device"], **summary["config"], **sizes}
    sections.append(("Settings", table(["Key", "Value"], [(k, str(v)) for k, v in facts.items()])))
    sections.append(("Why", table(["Choice"], [(reason,) for reason in summary["device_reasons"]])))
    title = f"Training report: {summary['stage'].upper()}"
    lead = f"{summary['steps']} steps, last training loss {summary['train_loss']:.3f}"
    return page(title, lead, sections)


def label_section(rows: Sequence[Sequence[tuple[str, bool]]], end_token: str) -> Markup:
    """What of each row is trained, token by token, with a legend. Rows are as `label_views` makes them."""
    views = Markup("").join(label_view(row, end_token) for row in rows)
    legend = f"Green is trained, dark green is the trained end of turn ({end_token}), grey is not trained."
    return paragraph(legend) + views
