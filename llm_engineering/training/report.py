"""The training report: curves, settings, and the labels token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.reports import label_view, line_chart, page, paragraph, table, write_report


def write_training_report(
    folder: Path,
    summary: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    label_rows: Sequence[tuple[list[int], list[int]]],
) -> None:
    """Write `report.json` and `report.html` from a run's summary and a few rows of `(input_ids, labels)`."""
    history = summary["history"]

    def curve(name: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name]) for entry in history if name in entry]

    sections = [("Loss", line_chart({"training": curve("loss"), "validation": curve("eval_loss")}, "step", "loss"))]
    if curve("rewards/margins"):
        margins = {"training": curve("rewards/margins"), "validation": curve("eval_rewards/margins")}
        sections.append(("Reward margin, chosen minus rejected", line_chart(margins, "step", "margin")))
    sections.append(("Learning rate", line_chart({"learning rate": curve("learning_rate")}, "step", "learning rate")))
    sections.append(("Speed", line_chart({"training": curve("tokens_per_second")}, "step", "real tokens a second")))
    sections.append(("Labels", label_section(label_rows, tokenizer)))
    sizes = {name: summary[name] for name in ("effective_batch", "num_processes")}
    facts = {**summary["device"], **summary["config"], **sizes}
    sections.append(("Settings", table(["Key", "Value"], [(k, str(v)) for k, v in facts.items()])))
    sections.append(("Why", table(["Choice"], [(reason,) for reason in summary["device_reasons"]])))
    title = f"Training report: {summary['stage'].upper()}"
    lead = f"{summary['steps']} steps, last training loss {summary['train_loss']:.3f}"
    write_report(folder, summary, page(title, lead, sections))


def label_section(rows: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase) -> Markup:
    """What of each row is trained, token by token, with a legend."""
    views = Markup("").join(
        label_view(
            [
                (str(tokenizer.decode([token])), label != IGNORE_INDEX)
                for token, label in zip(input_ids, labels, strict=True)
            ],
            str(tokenizer.eos_token),
        )
        for input_ids, labels in rows
    )
    legend = f"Green is trained, dark green is the trained end of turn ({tokenizer.eos_token}), grey is not trained."
    return paragraph(legend) + views
