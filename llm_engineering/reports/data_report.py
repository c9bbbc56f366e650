"""The data report: rows read, kept and set aside, their lengths, what is suspicious, and whether to train on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_evaluation, load_rows
from llm_engineering.data.prepare import prepare
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_row, preference_row
from llm_engineering.data.storage import stream_records, work_folder
from llm_engineering.formatting.datasets import Lengths, format_rows
from llm_engineering.recipe.data_blocks import DataConfig, FormattingConfig
from llm_engineering.reports.page import histogram, page, paragraph, table, write_report

# Under this, a dataset is too small to hold rows out of and still learn from.
MIN_ROWS = 20
# A file that loses more than this share of its rows is damaged, or is not what its owner thinks it is.
MAX_SHARE_SET_ASIDE = 0.5
# LIMA (arXiv:2305.11206) tunes on 1,000 chosen rows; with fewer, a model learns a manner rather than a subject.
FEW_ROWS = 1000
# Over this share a limit on length decides what the model learns.
MAX_SHARE_OVER_LENGTH = 0.1
_SHOWN = 12
# Reasons that say nothing against a file: the row is there in another place, or was not asked for.
_HARMLESS = ("exact_duplicate", "near_duplicate", "not_drawn")


def token_counts(lengths: Counter[int]) -> dict[str, float]:
    """Total, mean, median and largest of the rows' lengths in tokens."""
    rows = lengths.total()
    if not rows:
        return {"total": 0}
    total = sum(length * count for length, count in lengths.items())
    ordered, seen = sorted(lengths), 0
    middles = []
    for length in ordered:
        seen += lengths[length]
        # The median is the mean of the two middle values; for an odd number they are the same.
        middles += [length for rank in ((rows - 1) // 2, rows // 2) if seen - lengths[length] <= rank < seen]
    return {"total": total, "mean": round(total / rows, 1), "median": sum(middles) / 2, "max": ordered[-1]}


def write_data_report(
    folder: Path, kind: str, ledger: Ledger, tables: DatasetDict, lengths: Lengths, max_length: int, leaked: int = 0
) -> dict[str, Any]:
    """Write `report.json`, `report.html` and what they rest on, and return the JSON report.

    Beside them stand `quarantine.jsonl` (every row set aside), `findings.jsonl` (what is kept with a remark) and
    `clusters.jsonl` (every duplicate with the rows it repeats).

    Args:
        kind: `instruction` or `preference`.
        tables: `findings`, `clusters` and `suspicious`, as preparing made them.
        leaked: rows of an evaluation file that stand in the dataset too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = sum(lengths.kept.values(), Counter())
    reasons = ledger.by_reason(kind)
    truncated = lengths.truncated.dataset()
    findings = _counts(tables["findings"], "rule") | ({"truncated": len(truncated)} if len(truncated) else {})
    over = sum(count for length, count in lengths.all.items() if length > max_length)
    share_over = round(over / max(1, lengths.all.total()), 4)
    why = _unfit(kind, ledger, kept.total(), leaked)
    data: dict[str, Any] = {
        "kind": kind,
        "stages": {
            stage: {"read": ledger.read[stage], "kept": ledger.kept[stage], "quarantined": ledger.by_reason(stage)}
            for stage in ledger.read
        },
        "rows": {name: counts.total() for name, counts in lengths.kept.items()},
        "tokens": token_counts(kept),
        "max_length": max_length,
        "share_over_max_length": share_over,
        "truncated": len(truncated),
        "share_truncated": round(len(truncated) / max(1, kept.total()), 4),
        "turns": {str(turns): count for turns, count in sorted(lengths.turns.items())},
        "findings": findings,
        "exact_duplicates": reasons.get("exact_duplicate", 0),
        "near_duplicates": reasons.get("near_duplicate", 0),
        "leaks": {side: reasons.get(f"leaks_into_{side}", 0) for side in ("validation", "test")},
        "leaked_into_test": leaked,
        "guidance": _guidance(lengths, share_over, max_length, findings),
        "fit_to_train": not why,
        "why": why,
    }
    _write_lines(folder / "findings.jsonl", chain(stream_records(tables["findings"]), stream_records(truncated)))
    _write_lines(folder / "clusters.jsonl", stream_records(tables["clusters"]))
    _write_lines(folder / "quarantine.jsonl", (row.model_dump() for row in ledger.quarantine()))
    write_report(folder, data, _page(data, ledger, tables, lengths))
    return data


def verdict(data: dict[str, Any]) -> str:
    """The report's last line."""
    return "Fit to train on." if data["fit_to_train"] else f"Not fit to train on: {data['why']}."


def _page(data: dict[str, Any], ledger: Ledger, tables: DatasetDict, lengths: Lengths) -> str:
    flow = [
        (stage, counts["read"], counts["kept"], ", ".join(f"{r} {n}" for r, n in counts["quarantined"].items()))
        for stage, counts in data["stages"].items()
    ]
    examples = [
        (row.stage, row.reason, row.source, row.place, row.detail, row.text[:120])
        for rows in ledger.examples.values()
        for row in rows
    ]
    answers = ("Chosen", "Rejected") if data["kind"] == "preference" else ("Answer",)
    samples = [(name, row.source, _text(row.prompt), *_answers(row)) for name, row in lengths.samples]
    leaks = [row for row in examples if row[1].startswith("leaks_into") or row[1] == "contaminated"]
    used = ", ".join(f"{count:,} {name}" for name, count in data["rows"].items())
    over = f"{data['share_over_max_length']:.1%} of the rows are over max_length ({data['max_length']} tokens)."
    if data["truncated"]:
        over += f" {data['truncated']:,} of the rows that are used were cut there ({data['share_truncated']:.1%})."
    sections = [
        ("Read, kept, set aside", table(["Stage", "Read", "Kept", "Set aside, by reason"], flow)),
        ("Size", Markup("").join(paragraph(line) for line in data["guidance"])),
        ("Length in tokens", histogram(lengths.all, "tokens a row", data["max_length"]) + paragraph(over)),
        ("Turns", table(["Messages", "Rows"], [(int(turns), count) for turns, count in data["turns"].items()])),
        ("Reported and kept", _or_none(["Rule", "Rows"], list(data["findings"].items()))),
        (
            "Most suspicious rows",
            _or_none(
                ["Source", "Findings", "Prompt", "Answer"],
                [(r["source"], r["findings"], r["prompt"], r["answer"]) for r in tables["suspicious"]],
            ),
        ),
        ("Duplicates", _clusters(tables["clusters"])),
        ("Leaks", _or_none(["Stage", "Reason", "Source", "Row", "Detail", "Text"], leaks)),
        ("Sample rows", table(["Split", "Source", "Prompt", *answers], samples)),
        ("Set aside: examples", _or_none(["Stage", "Reason", "Source", "Place", "Detail", "Text"], examples)),
        ("Verdict", paragraph(verdict(data), "" if data["fit_to_train"] else "warn")),
    ]
    lead = f"{verdict(data)} {sum(data['rows'].values()):,} rows to use: {used or 'none'}"
    return page(f"Data report: {data['kind']} rows", lead, sections)


def _clusters(clusters: Dataset) -> Markup:
    """The first clusters, a line for each row."""
    shown = [r for r in clusters.select(range(min(len(clusters), 200))) if r["cluster"] < _SHOWN]
    rows = [(r["cluster"] + 1, r["source"], r["split"], r["fate"]) for r in shown]
    return _or_none(["Cluster", "Source", "Split", "What became of it"], rows)


def _guidance(lengths: Lengths, share_over: float, max_length: int, findings: dict[str, int]) -> list[str]:
    lines = []
    train = lengths.kept.get("train", sum(lengths.kept.values(), Counter())).total()
    if train < FEW_ROWS:
        lines.append(
            f"{train:,} rows to train on: enough to learn a manner of answering; for a subject, aim at {FEW_ROWS:,} "
            "or more good ones."
        )
    test = lengths.kept.get("test", Counter()).total()
    if test:
        # The 95 % interval of a share of n rows is widest at one half: 1.96 sqrt(0.25 / n).
        lines.append(f"{test:,} test rows: a share measured on them is known to ±{98 / test**0.5:.0f} points (95 %).")
    if share_over > MAX_SHARE_OVER_LENGTH:
        lines.append(
            f"{share_over:.0%} of the rows are over formatting.max_length ({max_length}): raise it if memory allows."
        )
    if "truncated" in findings:
        lines.append(
            f"{findings['truncated']:,} rows were cut at formatting.max_length ({max_length}): of them the end of the "
            "answer is not trained. Raise max_length, or set formatting.over_long to drop."
        )
    for rule, what in (("secret", "keys or passwords"), ("personal_data", "e-mail addresses or phone numbers")):
        if rule in findings:
            lines.append(f"{findings[rule]:,} findings of {what}: set data.rules.{rule} to mask or drop.")
    return lines or ["Nothing to remark."]


def _unfit(kind: str, ledger: Ledger, kept: int, leaked: int) -> str:
    rows, reasons = ledger.read[kind], ledger.by_reason(kind)
    problems = []
    if kept < MIN_ROWS:
        problems.append(f"only {kept} rows are left, at least {MIN_ROWS} are needed to hold some out")
    lost = {reason: count for reason, count in reasons.items() if reason not in _HARMLESS}
    if sum(lost.values()) > MAX_SHARE_SET_ASIDE * rows:
        named = ", ".join(f"{reason} {count}" for reason, count in lost.items())
        problems.append(f"more than half of the {rows} rows were set aside ({named})")
    if leaked:
        problems.append(f"{leaked} rows of the evaluation file stand in it too")
    return "; ".join(problems)


def _or_none(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    return table(head, rows) if rows else paragraph("None.")


def _counts(dataset: Dataset, column: str) -> dict[str, int]:
    return dict(Counter(record[column] for record in stream_records(dataset)).most_common())


def _write_lines(path: Path, records: Any) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(
        message.content if len(messages) == 1 else f"{message.role}: {message.content}" for message in messages
    )


def _answers(row: InstructionRow | PreferenceRow) -> tuple[str, ...]:
    if isinstance(row, InstructionRow):
        return (_text(row.completion),)
    return (_text(row.chosen), _text(row.rejected))


def inspect_file(
    file: str,
    against: str | None,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    formatting: FormattingConfig,
    folder: Path,
) -> dict[str, Any]:
    """Read, check and tokenise a dataset, write the data report to a folder, and return the figures.

    Args:
        against: an evaluation file; its rows are looked for in `file`.

    Returns:
        `format, rows, kept, quarantined, exact_duplicates, near_duplicates, leaked_into_test, tokens, fit_to_train`,
        `findings` by rule, and `why`, which is empty for a file that is fit.

    Raises:
        RequestError: a file is missing, empty or in no known format.
    """
    work = work_folder()
    ledger = Ledger()
    loaded = load_rows(file, None, data, work / "rows.arrow", ledger)
    evaluation = None
    if against is not None:
        evaluation = load_rows(against, loaded.kind, DataConfig(), work / "against.arrow", Ledger(), "_test").rows
    index = load_evaluation(data.decontaminate_against, data.decontaminate_ngram)
    lenient = data.model_copy(update={"strict": False})
    prepared = prepare(loaded.rows, loaded.kind, lenient, ledger, work, evaluation, index, inspected=True)

    to_row = instruction_row if loaded.kind == "instruction" else preference_row
    lengths = Lengths()
    # What is over-long is counted here, where a run would stop at it.
    counting = formatting.model_copy(update={"over_long": "drop"}) if formatting.over_long == "raise" else formatting
    for formatted in format_rows(
        (to_row(record) for record in stream_records(prepared.splits["train"])), loaded.kind, tokenizer, counting
    ):
        lengths.add("all", formatted)
        ledger.set_aside([formatted.rejected] if formatted.rejected is not None else [])
    kept = lengths.kept.get("all", Counter())
    ledger.record(loaded.kind, len(prepared.splits["train"]), kept.total())

    tables = DatasetDict(prepared.tables())
    report = write_data_report(
        folder, loaded.kind, ledger, tables, lengths, formatting.max_length, prepared.leaked if evaluation else 0
    )
    return {
        "format": loaded.format,
        "rows": ledger.read[loaded.kind],
        "kept": ledger.kept[loaded.kind],
        "quarantined": ledger.by_reason(loaded.kind),
        "exact_duplicates": report["exact_duplicates"],
        "near_duplicates": report["near_duplicates"],
        "leaked_into_test": report["leaked_into_test"],
        "findings": report["findings"],
        "tokens": token_counts(kept),
        "fit_to_train": report["fit_to_train"],
        "why": report["why"],
    }
