"""The data report for any file, without training: what `make inspect` shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from llm_engineering.config import DataConfig, FormattingConfig
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_evaluation, load_rows
from llm_engineering.data.prepare import prepare
from llm_engineering.data.report import token_counts, write_data_report
from llm_engineering.data.rows import instruction_row, preference_row
from llm_engineering.data.storage import stream_records, work_folder
from llm_engineering.formatting.datasets import Lengths, format_rows


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
