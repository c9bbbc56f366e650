"""Formats whole datasets: over-long rows and rows that spell special tokens are set aside by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from llm_engineering.config import FormattingConfig
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, PreferenceRow, instruction_row, preference_row
from llm_engineering.data.storage import TableWriter, stream_records
from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import IGNORE_INDEX, render_instruction, render_preference
from llm_engineering.progress import Progress

_IDS = List(Value("int32"))
_SFT_FEATURES = Features({"id": Value("string"), "input_ids": _IDS, "labels": _IDS})
_DPO_FEATURES = Features({"id": Value("string"), "prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS})
SAMPLE_ROWS = 5
Row = InstructionRow | PreferenceRow


class FormattedRow(NamedTuple):
    """A row as token ids.

    Attributes:
        record: what the trainer reads; empty for a row that is set aside.
        length: tokens; of a pair, those of its longer half; 0 where the row could not be tokenised.
        rejected: why the row is set aside, or None.
    """

    row: Row
    record: dict[str, Any]
    length: int
    rejected: Quarantined | None


class Lengths:
    """Lengths of rows in tokens and in turns, counted by value: a few hundred numbers for any number of rows."""

    def __init__(self) -> None:
        self.kept: dict[str, Counter[int]] = {}
        self.all: Counter[int] = Counter()
        self.turns: Counter[int] = Counter()
        self.samples: list[tuple[str, Row]] = []

    def add(self, split: str, formatted: FormattedRow) -> None:
        """Count a row of a split."""
        if formatted.length:
            self.all[formatted.length] += 1
        if formatted.rejected is None:
            kept = self.kept.setdefault(split, Counter())
            kept[formatted.length] += 1
            row = formatted.row
            self.turns[len(row.prompt) + len(row.completion if isinstance(row, InstructionRow) else row.chosen)] += 1
            if kept.total() <= SAMPLE_ROWS:
                self.samples.append((split, row))


def format_rows(
    rows: Iterable[Row], stage: str, tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> Iterator[FormattedRow]:
    """Token ids of each row, or the reason why it is set aside.

    Raises:
        WorkError: a row cannot be rendered, or is over-long under `over_long: raise`.
    """
    for row in rows:
        reason, detail = "", ""
        record: dict[str, Any] = {}
        length = 0
        special = _spelt_special_token(row, tokenizer)
        if special:
            reason = "special_token_in_text"
            detail = f"its text spells {special}, which the tokenizer would read as the token itself"
        else:
            record, length, prompt_length = _tokenise(row, tokenizer)
            if prompt_length >= config.max_length:
                reason, detail = "no_trained_token", f"its prompt alone has {prompt_length} tokens"
            elif length > config.max_length:
                reason, detail = "over_long", f"it has {length} tokens"
            detail += f", formatting.max_length is {config.max_length}" if reason else ""
        if reason in ("over_long", "no_trained_token") and config.over_long == "raise":
            raise WorkError(
                f"Row {row.id} ({row.source}) is over-long: {detail}, and formatting.over_long is raise. "
                "Raise max_length, shorten the row, or set over_long to drop."
            )
        if not reason:
            yield FormattedRow(row, record, length, None)
            continue
        text = row.prompt[-1].content[:200]
        rejected = Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)
        yield FormattedRow(row, {}, length, rejected)


def format_splits(
    splits: Mapping[str, Dataset],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    config: FormattingConfig,
    folder: Path,
    ledger: Ledger,
) -> tuple[DatasetDict, Lengths]:
    """Formatted datasets by split, written to a folder, and the rows' lengths.

    Instruction rows become `input_ids` and `labels` (-100 where nothing is trained), preference rows `prompt_ids`,
    `chosen_ids` and `rejected_ids`; all lists of token ids. What is set aside is entered in the ledger.

    Args:
        kind: `instruction` or `preference`.

    Raises:
        WorkError: as `format_rows`, or no row of a split is left.
    """
    to_row = instruction_row if kind == "instruction" else preference_row
    features = _SFT_FEATURES if kind == "instruction" else _DPO_FEATURES
    datasets = DatasetDict()
    lengths = Lengths()
    progress = Progress(f"{kind} rows tokenised", sum(map(len, splits.values())))
    for name, split in splits.items():
        reasons: Counter[str] = Counter()
        with TableWriter(folder / f"formatted-{name}.arrow", features) as table:
            for formatted in format_rows(map(to_row, stream_records(split)), kind, tokenizer, config):
                lengths.add(name, formatted)
                if formatted.rejected is None:
                    table.write(formatted.record)
                else:
                    reasons[formatted.rejected.reason] += 1
                    ledger.set_aside([formatted.rejected])
                progress.advance()
        if not table.rows:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise WorkError(
                f"All {len(split)} rows of the {name} split were set aside while formatting ({counts}). "
                "If they are over-long, raise formatting.max_length."
            )
        datasets[name] = table.dataset()
    ledger.record(kind, sum(map(len, splits.values())), sum(map(len, datasets.values())))
    return datasets, lengths


class _Tokenised(NamedTuple):
    """A formatted record, its length in tokens (of a pair, that of its longer half), and that of its prompt."""

    record: dict[str, Any]
    length: int
    prompt_length: int


def _tokenise(row: Row, tokenizer: PreTrainedTokenizerBase) -> _Tokenised:
    if isinstance(row, InstructionRow):
        tokens = render_instruction(row, tokenizer)
        prompt_length = next(i for i, label in enumerate(tokens.labels) if label != IGNORE_INDEX)
        return _Tokenised({"id": row.id, **tokens._asdict()}, len(tokens.input_ids), prompt_length)
    pair = render_preference(row, tokenizer)
    length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    return _Tokenised({"id": row.id, **pair._asdict()}, length, len(pair.prompt_ids))


def _spelt_special_token(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    completions = [row.completion] if isinstance(row, InstructionRow) else [row.chosen, row.rejected]
    texts = [m.content for messages in (row.prompt, *completions) for m in messages]
    return next((t for t in tokenizer.all_special_tokens if any(t in text for text in texts)), "")
