"""The data report: what was read, kept and set aside, how long rows are, and a few of them to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.quarantine import by_reason
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.reports import histogram, page, paragraph, table, write_report

SAMPLE_ROWS = 5
SHOWN_PER_REASON = 3


def token_counts(lengths: Sequence[int]) -> dict[str, float]:
    """Total, mean, median and largest of the rows' lengths in tokens."""
    return {
        "total": sum(lengths),
        "mean": round(mean(lengths), 1),
        "median": float(median(lengths)),
        "max": max(lengths),
    }


def write_data_report(
    folder: Path,
    kind: str,
    ledger: Ledger,
    splits: Mapping[str, Sequence[InstructionRow | PreferenceRow]],
    lengths: Mapping[str, Sequence[int]],
    max_length: int,
) -> dict[str, Any]:
    """Write `report.json`, `report.html` and `quarantine.jsonl` into a folder, and return the JSON report.

    Args:
        kind: `instruction` or `preference`.
        splits: the rows by split, before formatting.
        lengths: tokens of each formatted row, by split; of a pair, of its longer half.
    """
    all_lengths = [length for part in lengths.values() for length in part]
    stages: dict[str, dict[str, Any]] = {
        stage: {
            "read": ledger.read[stage],
            "kept": ledger.kept[stage],
            "quarantined": by_reason(row for row in ledger.quarantine if row.stage == stage),
        }
        for stage in ledger.read
    }
    data: dict[str, Any] = {
        "kind": kind,
        "stages": stages,
        "rows": {name: len(part) for name, part in lengths.items()},
        "tokens": token_counts(all_lengths),
        "max_length": max_length,
    }
    flow = [
        (s, c["read"], c["kept"], ", ".join(f"{r} {n}" for r, n in c["quarantined"].items())) for s, c in stages.items()
    ]
    samples = [
        (name, row.source, _text(row.prompt), *_answers(row))
        for name in splits
        for row in list(splits[name])[:SAMPLE_ROWS]
    ]
    answers = ("Chosen", "Rejected") if kind == "preference" else ("Answer",)
    examples = []
    for reason in by_reason(ledger.quarantine):
        found = [row for row in ledger.quarantine if row.reason == reason]
        examples += [(r.stage, reason, r.source, r.place, r.detail, r.text[:120]) for r in found[:SHOWN_PER_REASON]]
    write_report(
        folder,
        data,
        page(
            f"Data report: {kind} rows",
            f"{len(all_lengths):,} rows to use: "
            + ", ".join(f"{len(part):,} {name}" for name, part in lengths.items()),
            [
                ("Read, kept, set aside", table(["Stage", "Read", "Kept", "Set aside, by reason"], flow)),
                ("Length in tokens", histogram(all_lengths, "tokens a row", max_length)),
                ("Sample rows", table(["Split", "Source", "Prompt", *answers], samples)),
                (
                    "Set aside: examples",
                    table(["Stage", "Reason", "Source", "Place", "Detail", "Text"], examples)
                    if examples
                    else paragraph("Nothing was set aside."),
                ),
            ],
        ),
    )
    with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.model_dump(), ensure_ascii=False) + "\n" for row in ledger.quarantine)
    return data


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(
        message.content if len(messages) == 1 else f"{message.role}: {message.content}" for message in messages
    )


def _answers(row: InstructionRow | PreferenceRow) -> tuple[str, ...]:
    if isinstance(row, InstructionRow):
        return (_text(row.completion),)
    return (_text(row.chosen), _text(row.rejected))
