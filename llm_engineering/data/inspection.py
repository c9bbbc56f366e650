"""The data report for any file, without training: what `make inspect` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_engineering.config import DataConfig, FormattingConfig
from llm_engineering.data.duplicates import NearDuplicates
from llm_engineering.data.formats import is_preference_file, read_instructions, read_preferences
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.quarantine import by_reason
from llm_engineering.data.report import token_counts, write_data_report
from llm_engineering.data.rows import InstructionRow, PreferenceRow
from llm_engineering.data.validate import prompt_text, row_text, validate_instructions, validate_preferences
from llm_engineering.formatting.datasets import format_rows

# Under this, a dataset is too small to hold rows out of and still learn from.
MIN_ROWS = 20
# A file that loses more than this share of its rows is damaged, or is not what its owner thinks it is.
MAX_SHARE_SET_ASIDE = 0.5


def inspect_file(
    file: Path,
    against: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    formatting: FormattingConfig,
    folder: Path,
) -> dict[str, Any]:
    """Read, validate and tokenise a file, write the data report to a folder, and return the figures.

    Args:
        against: an evaluation file; its rows are looked for in `file`.

    Returns:
        `format, rows, kept, quarantined, exact_duplicates, near_duplicates, leaked_into_test, tokens, fit_to_train`,
        and `why`, which is empty for a file that is fit.

    Raises:
        RequestError: a file is missing, empty or in no known format.
    """
    name, rows, read_rejects = _read(file)
    kind = "preference" if rows and isinstance(rows[0], PreferenceRow) else "instruction"
    ledger = Ledger()
    ledger.record(kind, len(rows) + len(read_rejects), len(rows), read_rejects)
    valid, rejected = _validate(rows, data.near_duplicate_threshold)
    ledger.record(kind, len(rows), len(valid), rejected)
    formatted, kept, rejected = format_rows(valid, tokenizer, formatting)
    ledger.record(kind, len(valid), len(kept), rejected)
    lengths = [length for _, length in formatted]

    evaluation = _read(against)[1] if against is not None else []
    leaked = _found_again(evaluation, rows, data.near_duplicate_threshold)
    reasons = by_reason(ledger.quarantine)
    if lengths:
        write_data_report(folder, kind, ledger, {"all": kept}, {"all": lengths}, formatting.max_length)
    why = _unfit(ledger.read[kind], len(kept), reasons, leaked)
    return {
        "format": name,
        "rows": ledger.read[kind],
        "kept": len(kept),
        "quarantined": reasons,
        "exact_duplicates": reasons.get("exact_duplicate", 0),
        "near_duplicates": reasons.get("near_duplicate", 0),
        "leaked_into_test": leaked,
        "tokens": token_counts(lengths) if lengths else {"total": 0},
        "fit_to_train": not why,
        "why": why,
    }


def _read(file: Path) -> tuple[str, Sequence[InstructionRow] | Sequence[PreferenceRow], list[Any]]:
    return read_preferences(file) if is_preference_file(file) else read_instructions(file)


def _validate(rows: Sequence[Any], threshold: float) -> tuple[list[Any], list[Any]]:
    is_preference = bool(rows) and isinstance(rows[0], PreferenceRow)
    return validate_preferences(rows, threshold) if is_preference else validate_instructions(rows, threshold)


def _found_again(evaluation: Sequence[Any], rows: Sequence[Any], threshold: float) -> int:
    """How many evaluation rows stand in `rows` too: the same prompt, whatever its answer, or a near duplicate."""
    prompts = {prompt_text(row) for row in rows}
    near = NearDuplicates(threshold)
    for row in {row.id: row for row in rows}.values() if evaluation else ():
        near.add(row.id, row_text(row))
    return sum(prompt_text(row) in prompts or near.find(row_text(row)) is not None for row in evaluation)


def _unfit(rows: int, kept: int, reasons: dict[str, int], leaked: int) -> str:
    problems = []
    if kept < MIN_ROWS:
        problems.append(f"only {kept} rows are left, at least {MIN_ROWS} are needed to hold some out")
    # Duplicates go without harm: what stays says the same.
    lost = rows - kept - reasons.get("exact_duplicate", 0) - reasons.get("near_duplicate", 0)
    if lost > MAX_SHARE_SET_ASIDE * rows:
        problems.append(f"{lost} of {rows} rows were set aside, so the file is not what it seems to be")
    if leaked:
        problems.append(f"{leaked} rows of the evaluation file stand in it too")
    return "; ".join(problems)
