"""Formats whole datasets: over-long rows and rows that spell special tokens are set aside by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from datasets import DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from llm_engineering.config import FormattingConfig
from llm_engineering.data.quarantine import Quarantined, by_reason
from llm_engineering.data.rows import InstructionRow, PreferenceRow, to_dataset
from llm_engineering.data.split import SPLITS
from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import IGNORE_INDEX, render_instruction, render_preference

_IDS = List(Value("int32"))
_SFT_FEATURES = Features({"id": Value("string"), "input_ids": _IDS, "labels": _IDS})
_DPO_FEATURES = Features({"id": Value("string"), "prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS})
RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


def format_rows(
    rows: Sequence[RowT], tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> tuple[list[tuple[dict[str, Any], int]], list[RowT], list[Quarantined]]:
    """Token ids of each row with its length (of a pair, that of its longer half), the rows kept, and those set aside.

    Raises:
        WorkError: a row cannot be rendered, or is over-long under `over_long: raise`.
    """
    formatted: list[tuple[dict[str, Any], int]] = []
    kept: list[RowT] = []
    quarantine: list[Quarantined] = []
    for row in rows:
        reason, detail = "", ""
        tokens = _Tokenised({}, 0, 0)
        special = _spelt_special_token(row, tokenizer)
        if special:
            reason = "special_token_in_text"
            detail = f"its text spells {special}, which the tokenizer would read as the token itself"
        else:
            tokens = _tokenise(row, tokenizer)
            if tokens.prompt_length >= config.max_length:
                reason = "no_trained_token"
                detail = f"its prompt alone has {tokens.prompt_length} tokens"
            elif tokens.length > config.max_length:
                reason, detail = "over_long", f"it has {tokens.length} tokens"
            detail += f", formatting.max_length is {config.max_length}" if reason else ""
        if reason in ("over_long", "no_trained_token") and config.over_long == "raise":
            raise WorkError(
                f"Row {row.id} ({row.source}) is over-long: {detail}, and formatting.over_long is raise. "
                "Raise max_length, shorten the row, or set over_long to drop."
            )
        if reason:
            stage = "instruction" if isinstance(row, InstructionRow) else "preference"
            text = row.prompt[-1].content[:200]
            quarantine.append(
                Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)
            )
        else:
            formatted.append((tokens.record, tokens.length))
            kept.append(row)
    return formatted, kept, quarantine


def format_splits(
    splits: dict[str, list[RowT]], tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> tuple[DatasetDict, dict[str, list[int]], list[Quarantined]]:
    """Formatted datasets by split, the rows' lengths by split, and what was set aside.

    Instruction rows become `input_ids` and `labels` (-100 where nothing is trained), preference rows `prompt_ids`,
    `chosen_ids` and `rejected_ids`; all lists of token ids.

    Raises:
        WorkError: as `format_rows`, or no row of a split is left.
    """
    datasets = DatasetDict()
    lengths: dict[str, list[int]] = {}
    quarantine: list[Quarantined] = []
    for name in SPLITS:
        formatted, _, rejected = format_rows(splits[name], tokenizer, config)
        if not formatted:
            reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items())
            raise WorkError(
                f"All {len(splits[name])} rows of the {name} split were set aside while formatting ({reasons}). "
                "If they are over-long, raise formatting.max_length."
            )
        features = _SFT_FEATURES if isinstance(splits[name][0], InstructionRow) else _DPO_FEATURES
        datasets[name] = to_dataset([record for record, _ in formatted], features)
        lengths[name] = [length for _, length in formatted]
        quarantine += rejected
    return datasets, lengths, quarantine


class _Tokenised(NamedTuple):
    """A formatted record, its length in tokens (of a pair, that of its longer half), and that of its prompt."""

    record: dict[str, Any]
    length: int
    prompt_length: int


def _tokenise(row: InstructionRow | PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> _Tokenised:
    if isinstance(row, InstructionRow):
        tokens = render_instruction(row, tokenizer)
        prompt_length = next(i for i, label in enumerate(tokens.labels) if label != IGNORE_INDEX)
        return _Tokenised({"id": row.id, **tokens._asdict()}, len(tokens.input_ids), prompt_length)
    pair = render_preference(row, tokenizer)
    length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    return _Tokenised({"id": row.id, **pair._asdict()}, length, len(pair.prompt_ids))


def _spelt_special_token(row: InstructionRow | PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> str:
    completions = [row.completion] if isinstance(row, InstructionRow) else [row.chosen, row.rejected]
    texts: Sequence[str] = [m.content for messages in (row.prompt, *completions) for m in messages]
    return next((t for t in tokenizer.all_special_tokens if any(t in text for text in texts)), "")
