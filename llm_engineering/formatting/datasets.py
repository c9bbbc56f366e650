"""Formats whole datasets: over-long rows and rows that spell special tokens are set aside by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from llm_engineering.config import FormattingConfig
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.private import redacted
from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, PreferenceRow, instruction_row, preference_row
from llm_engineering.data.storage import TableWriter, stream_records
from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import CrossingTokensError, Pair, Tokens, prompt_length, render
from llm_engineering.progress import Progress

_IDS = List(Value("int32"))
_SFT_FEATURES = Features({"id": Value("string"), "input_ids": _IDS, "labels": _IDS})
_DPO_FEATURES = Features({"id": Value("string"), "prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS})
SAMPLE_ROWS = 5
_BATCH_ROWS = 256
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
    special_tokens = tuple(tokenizer.all_special_tokens)
    waiting = iter(rows)
    # Tokenised in batches, which tokenizers spreads over the cores.
    while batch := list(islice(waiting, _BATCH_ROWS)):
        special = [_spelt_special_token(row, special_tokens) for row in batch]
        rendered = iter(render([row for row, token in zip(batch, special, strict=True) if not token], tokenizer))
        for row, token in zip(batch, special, strict=True):
            if token:
                detail = f"its text spells {token}, which the tokenizer would read as the token itself"
                yield _set_aside(row, stage, "special_token_in_text", detail)
            else:
                yield _judged(row, stage, next(rendered), config)


def _judged(
    row: Row, stage: str, tokens: Tokens | Pair | CrossingTokensError, config: FormattingConfig
) -> FormattedRow:
    if isinstance(tokens, CrossingTokensError):
        return _set_aside(row, stage, "crossing_tokens", str(tokens))
    if isinstance(tokens, Tokens):
        start, length = prompt_length(tokens), len(tokens.input_ids)
    else:
        start = len(tokens.prompt_ids)
        length = start + max(len(tokens.chosen_ids), len(tokens.rejected_ids))
    if length <= config.max_length:
        return FormattedRow(row, {"id": row.id, **tokens._asdict()}, length, None)
    fits_prompt = start < config.max_length
    detail = f"it has {length} tokens" if fits_prompt else f"its prompt alone has {start} tokens"
    detail += f", formatting.max_length is {config.max_length}"
    if config.over_long == "raise":
        raise WorkError(
            f"Row {row.id} ({row.source}) is over-long: {detail}, and formatting.over_long is raise. "
            "Raise max_length, shorten the row, or set over_long to drop."
        )
    return _set_aside(row, stage, "over_long" if fits_prompt else "no_trained_token", detail, length)


def _set_aside(row: Row, stage: str, reason: str, detail: str, length: int = 0) -> FormattedRow:
    text = redacted(row.prompt[-1].content)[:200]
    rejected = Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)
    return FormattedRow(row, {}, length, rejected)


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


def _spelt_special_token(row: Row, special_tokens: Sequence[str]) -> str:
    completions = [row.completion] if isinstance(row, InstructionRow) else [row.chosen, row.rejected]
    texts = [m.content for messages in (row.prompt, *completions) for m in messages]
    return next((token for token in special_tokens if any(token in text for text in texts)), "")
