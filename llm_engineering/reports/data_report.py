"""The data report: rows read, kept and set aside, their lengths, suspicious rows, and whether the data is fit to train on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.dataset_rules import OVER_QUARTER
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_evaluation, load_rows
from llm_engineering.data.prepare import prepare
from llm_engineering.data.reasons import REASONS
from llm_engineering.data.rows import MIN_ROWS, Message, Row, read_row
from llm_engineering.data.storage import stream_records, work_folder
from llm_engineering.errors import RequestError
from llm_engineering.formatting.datasets import Lengths, format_rows
from llm_engineering.formatting.template_check import check_chat_template
from llm_engineering.progress import counted
from llm_engineering.recipe.data_blocks import DataConfig, FormattingConfig
from llm_engineering.reports.data_advice import advice, held_out
from llm_engineering.reports.page import (
    Verdict,
    cards,
    details,
    funnel,
    histogram,
    page,
    paragraph,
    table,
    write_report,
)

# A file that loses more than this share of its rows is damaged, or is not what its owner thinks it is.
MAX_SHARE_SET_ASIDE = 0.5
_CLUSTERS_SHOWN = 12
_SHOWN_CHARS = 140
# Reasons that do not count against a file: the row is elsewhere in it, or is a good row that the split has no place for.
_HARMLESS = ("exact_duplicate", "near_duplicate", OVER_QUARTER)


def token_counts(lengths: Counter[int]) -> dict[str, float]:
    """The total, mean, median and maximum of the rows' lengths in tokens, given as `{length: rows}`."""
    rows = lengths.total()
    if not rows:
        return {"total": 0}
    total = sum(length * count for length, count in lengths.items())
    ordered = sorted(lengths)
    # The median is the mean of the two middle rows, which are the same row if their number is odd.
    ranks = np.cumsum([lengths[length] for length in ordered])
    middles = np.searchsorted(ranks, [(rows - 1) // 2, rows // 2], side="right")
    median = (ordered[middles[0]] + ordered[middles[1]]) / 2
    return {"total": total, "mean": round(total / rows, 1), "median": median, "max": ordered[-1]}


def write_data_report(
    folder: Path,
    kind: str,
    ledger: Ledger,
    tables: DatasetDict,
    lengths: Lengths,
    max_length: int,
    leaked: int = 0,
    epochs: float | None = None,
    template: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the report to a folder, and return it as JSON.

    The files are `report.json`, `report.html`, `quarantine.jsonl` (every row that was set aside), `findings.jsonl`
    (rows that were kept with a finding) and `clusters.jsonl` (every duplicate with the rows that it repeats).

    Args:
        tables: `findings`, `clusters` and `suspicious`, from `prepare`.
        leaked: number of rows of an evaluation file that are also in the dataset.
        epochs: how often training reads the rows; None if no stage of the run trains on them.
        template: what `check_chat_template` found.
        facts: of the run, for the head of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = sum(lengths.kept.values(), Counter())
    reasons = ledger.by_reason(kind)
    truncated = lengths.truncated.dataset()
    findings = _rule_counts(tables["findings"]) | _rule_counts(truncated)
    over = sum(count for length, count in lengths.all.items() if length > max_length)
    share_over = round(over / max(1, lengths.all.total()), 4)
    why = _unfit_reasons(kind, ledger, kept.total() - lengths.replayed, leaked)
    data: dict[str, Any] = {
        "kind": kind,
        "stages": {
            stage: {"read": ledger.read[stage], "kept": ledger.kept[stage], "quarantined": ledger.by_reason(stage)}
            for stage in ledger.read
        },
        "rows": {name: counts.total() for name, counts in lengths.kept.items()},
        "tokens": token_counts(kept),
        "held_out": {name: held_out(counts) for name, counts in lengths.documents.items() if any(counts)},
        "trained": {name: counts._asdict() for name, counts in lengths.trained.items()},
        "epochs": epochs,
        "tokens_to_train": round((epochs or 0) * sum(counts.tokens for counts in lengths.trained.values())),
        "max_length": max_length,
        "share_over_max_length": share_over,
        "truncated": findings.get("truncated", 0),
        "ended_at_last_sentence": lengths.ended,
        "drafts": ledger.drafts.get(kind, 0),
        "share_truncated": round(findings.get("truncated", 0) / max(1, kept.total()), 4),
        "turns": {str(turns): count for turns, count in sorted(lengths.turns.items())},
        "findings": findings,
        "unread_columns": {stage: names for stage, names in ledger.unread.items() if names},
        "respaced_answers": lengths.respaced,
        "exact_duplicates": reasons.get("exact_duplicate", 0),
        "near_duplicates": reasons.get("near_duplicate", 0),
        "leaks": {side: reasons.get(f"leaks_into_{side}", 0) for side in ("validation", "test")},
        "leaked_into_test": leaked,
        "guidance": [*advice(kind, lengths, share_over, max_length, findings), *template],
        "fit_to_train": not why,
        "why": why,
    }
    _write_lines(folder / "findings.jsonl", chain(stream_records(tables["findings"]), stream_records(truncated)))
    _write_lines(folder / "clusters.jsonl", stream_records(tables["clusters"]))
    _write_lines(folder / "quarantine.jsonl", (row.model_dump() for row in ledger.quarantine()))
    write_report(folder, data, _page(data, ledger, tables, lengths, facts or {}))
    return data


def _page(data: dict[str, Any], ledger: Ledger, tables: DatasetDict, lengths: Lengths, facts: Mapping[str, str]) -> str:
    verdict = Verdict("Fit to train on", "good") if data["fit_to_train"] else Verdict("Not fit to train on", "bad")
    stages = [(stage, counts["read"], counts["kept"]) for stage, counts in data["stages"].items()]
    reasons = [
        (stage, reason, count, REASONS.get(reason, ""))
        for stage, counts in data["stages"].items()
        for reason, count in counts["quarantined"].items()
    ]
    examples = {
        reason: [(row.stage, row.source, row.place, row.detail, row.text[:120]) for row in rows]
        for reason, rows in ledger.examples.items()
    }
    head = ["Stage", "Source", "Place", "Detail", "Text"]
    samples = [
        (f"{split}: {_text(row.prompt or row.answers[0])[:_SHOWN_CHARS]}", _sample(data["kind"], row))
        for split, row in lengths.samples
    ]
    leaks = [(why, *row) for why, rows in examples.items() if why.startswith(("leaks_into", "contam")) for row in rows]
    over = f"{data['share_over_max_length']:.1%} of the rows are longer than max_length ({data['max_length']} tokens)."
    if data["kind"] == "text":
        over += " They are divided into pieces, which are counted below as rows."
    if data["truncated"]:
        over += f" {data['truncated']:,} of the kept rows were truncated to it ({data['share_truncated']:.1%})."
    lengths_chart = histogram(lengths.all, "tokens per row", data["max_length"])
    turns_chart = histogram(lengths.turns, "turns per row")
    charts = [("Tokens", lengths_chart + paragraph(over, "small")), ("Turns", turns_chart)]
    unread = [
        paragraph(f"Columns of the {stage} rows that nothing reads: {', '.join(names)}.")
        for stage, names in data["unread_columns"].items()
    ]
    sections = [
        ("From read to trained", _funnel(data)),
        ("Lengths", cards(charts) if lengths_chart else Markup("")),
        ("Advice", Markup("").join(paragraph(line) for line in data["guidance"])),
        ("Read and kept", table(["Stage", "Read", "Kept"], stages) + Markup("").join(unread)),
        ("Set aside, by reason", table(["Stage", "Reason", "Rows", "What it means"], reasons)),
        ("To train on", _trained(data)),
        (
            "Held-out documents",
            table(
                ["Split", "Rows", "Documents", "Document with most rows", "Its rows", "Its share"],
                [
                    (name, s["rows"], s["documents"], s["largest"], s["largest_rows"], f"{s['largest_share']:.0%}")
                    for name, s in data["held_out"].items()
                ],
            ),
        ),
        (
            "Findings in kept rows",
            table(["Rule", "Rows", "What it means"], [(n, c, REASONS.get(n, "")) for n, c in data["findings"].items()]),
        ),
        (
            "Most suspicious rows",
            Markup("").join(
                details(f"{row['findings']}: {row['prompt'][:_SHOWN_CHARS]}", paragraph(row["answer"], "answer"))
                for row in tables["suspicious"]
            ),
        ),
        ("Duplicates", _clusters(tables["clusters"])),
        ("Leaks and contamination", table(["Reason", *head], leaks)),
        ("Sample rows", Markup("").join(details(said, shown) for said, shown in samples)),
        (
            "Examples of rows set aside",
            Markup("").join(
                details(f"{reason}: {REASONS.get(reason, '')}", table(head, rows)) for reason, rows in examples.items()
            ),
        ),
    ]
    used = ", ".join(f"{count:,} {name}" for name, count in data["rows"].items())
    counts = data["stages"].get(data["kind"], {"read": 0, "kept": 0})
    lead = [
        *([f"The rows are not fit to train on: {data['why']}."] if data["why"] else []),
        f"{counted(counts['read'], 'row')} read or written, {counts['kept']:,} kept: {used or 'none'}.",
        data["guidance"][0],
    ]
    sample = samples[0][1] if samples else None
    return page(f"Data report: {data['kind']} rows", lead, sections, facts=facts, verdict=verdict, sample=sample)


def _funnel(data: dict[str, Any]) -> Markup:
    """The rows that were read, those that were no drafts, those that were kept, and those to train on."""
    counts = data["stages"].get(data["kind"], {"read": 0, "kept": 0})
    steps = {"read or written": counts["read"]}
    if data["drafts"]:
        steps["usable"] = counts["read"] - data["drafts"]
    return funnel({**steps, "kept": counts["kept"], **{f"for {name}": rows for name, rows in data["rows"].items()}})


def _sample(kind: str, row: Row) -> Markup:
    """A row: the prompt, and below it each answer."""
    names = {"preference": ("Chosen", "Rejected"), "prompt": ("Accepted answer",), "text": ("Text",)}.get(
        kind, ("Answer",)
    )
    shown = [(name, paragraph(_text(answer))) for name, answer in zip(names, row.answers, strict=True)]
    return cards([*([("Prompt", paragraph(_text(row.prompt)))] if row.prompt else []), *shown], "stack")


def _trained(data: dict[str, Any]) -> Markup:
    """The rows of the training split by what they are, with the tokens that training reads of each."""
    epochs = data["epochs"]
    rows = [
        (name, counts["rows"], counts["tokens"], *([round(epochs * counts["tokens"])] if epochs else []))
        for name, counts in data["trained"].items()
    ]
    said = (
        f"{data['tokens_to_train']:,} tokens in {epochs:g} epoch{'' if epochs == 1 else 's'}."
        if epochs
        else "No stage of this run trains on them."
    )
    head = ["Rows", "Number", "Tokens in one epoch", *(["Tokens in all epochs"] if epochs else [])]
    return paragraph(said) + table(head, rows)


def _clusters(clusters: Dataset) -> Markup:
    """A table of the rows of the first clusters."""
    shown = [r for r in clusters.select(range(min(len(clusters), 200))) if r["cluster"] < _CLUSTERS_SHOWN]
    rows = [(r["cluster"] + 1, r["source"], r["split"], r["fate"]) for r in shown]
    return table(["Cluster", "Source", "Split", "Result"], rows)


def _unfit_reasons(kind: str, ledger: Ledger, kept: int, leaked: int) -> str:
    """Why the rows are not fit to train on; empty if they are.

    Args:
        kept: rows that are left, without those of general datasets.
    """
    reasons = {reason: count for reason, count in ledger.by_reason(kind).items() if reason not in _HARMLESS}
    named = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    problems = []
    if kept < MIN_ROWS:
        are = "is" if kept == 1 else "are"
        problems.append(
            f"only {counted(kept, 'row')} {are} left, and at least {MIN_ROWS} are needed to train and to hold some out"
        )
    # Drafts that the writer could not use say nothing about the rows that were written. A small model writes several
    # questions for each good one.
    rows = ledger.read[kind] - ledger.drafts.get(kind, 0)
    harmless = sum(ledger.by_reason(kind).get(reason, 0) for reason in _HARMLESS)
    if rows - harmless - ledger.kept[kind] > MAX_SHARE_SET_ASIDE * rows:
        problems.append(f"more than half of the {rows} rows were set aside ({named})")
    elif problems and named:
        problems[-1] += f" (set aside: {named})"
    if leaked:
        problems.append(f"{leaked} row(s) of the evaluation file are also in the dataset")
    return "; ".join(problems)


def refuse_unfit_data(report: dict[str, Any], folder: Path, kept: Path) -> None:
    """Refuse data that its report calls not fit to train on.

    Args:
        kept: a folder for a copy of it, because a failed step stores no artifact.

    Raises:
        RequestError: the data is not fit. The message has the reasons and the place of the copy.
    """
    if not report["why"]:
        return
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    before = [
        f"{counts['read']} {stage}s read, {counts['kept']} kept"
        for stage, counts in report["stages"].items()
        if stage in ("document", "passage")
    ]
    raise RequestError(
        f"The {report['kind']} rows are not fit to train on: {'; '.join([report['why'], *before])}. Nothing was trained "
        f"with them. {kept / 'report.html'} shows what was set aside. Add documents or rows, or set data.train_unfit to "
        "true to train anyway: the model version is then marked with unfit_data."
    )


def _rule_counts(findings: Dataset) -> dict[str, int]:
    return dict(Counter(record["rule"] for record in stream_records(findings)).most_common())


def _write_lines(path: Path, records: Any) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _text(messages: Sequence[Message]) -> str:
    """Messages as one text, with their roles if there are several."""
    return "\n".join(
        message.content if len(messages) == 1 else f"{message.role}: {message.content}" for message in messages
    )


def inspect_file(
    file: str,
    against: str | None,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    formatting: FormattingConfig,
    folder: Path,
) -> dict[str, Any]:
    """Read, check and tokenise a dataset, write its data report to a folder, and return the numbers.

    Args:
        against: an evaluation file, whose rows are searched for in `file`.

    Returns:
        The object that `make inspect ARGS=--json` prints. `why` is empty if the file is fit to train on.

    Raises:
        RequestError: a file is missing or empty, its format is not known, or the chat template cannot be used.
    """
    work = work_folder()
    ledger = Ledger()
    template = check_chat_template(tokenizer)
    loaded = load_rows(file, None, data, work / "rows.arrow", ledger)
    evaluation = None
    if against is not None:
        evaluation = load_rows(against, loaded.kind, data, work / "against.arrow", Ledger(), "_test").rows
    index = load_evaluation(data.decontaminate_against, data.decontaminate_ngram)
    lenient = data.model_copy(update={"strict": False})
    prepared = prepare(loaded.rows, loaded.kind, lenient, ledger, work, evaluation, index, inspected=True)

    lengths = Lengths()
    # With over_long `raise` a run stops at the first over-long row. Here all of them are counted.
    counting = formatting.model_copy(update={"over_long": "drop"}) if formatting.over_long == "raise" else formatting
    for formatted in format_rows(
        (read_row(record, loaded.kind) for record in stream_records(prepared.splits["train"])),
        loaded.kind,
        tokenizer,
        counting,
    ):
        lengths.add("all", formatted)
        ledger.set_aside([formatted.rejected] if formatted.rejected is not None else [])
    kept = lengths.kept.get("all", Counter())
    # A conversation may become several rows to train on, and `kept` counts those.
    ledger.record(loaded.kind, len(prepared.splits["train"]), lengths.turns.total())

    tables = DatasetDict(prepared.tables())
    report = write_data_report(
        folder,
        loaded.kind,
        ledger,
        tables,
        lengths,
        formatting.max_length,
        prepared.leaked if evaluation else 0,
        template=template,
        facts={"File": file, "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "Tokenizer": tokenizer.name_or_path},
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
        "unread_columns": ledger.unread[loaded.kind],
        "template": template,
        "respaced_answers": lengths.respaced,
        "tokens": token_counts(kept),
        "fit_to_train": report["fit_to_train"],
        "why": report["why"],
    }
