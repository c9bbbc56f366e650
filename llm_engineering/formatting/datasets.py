"""Formats whole datasets: over-long rows and rows that spell special tokens are set aside by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from llm_engineering.config import FormattingConfig
from llm_engineering.data.quarantine import Quarantined, by_reason
from llm_engineering.data.rows import InstructionRow, PreferenceRow
from llm_engineering.data.split import SPLITS
from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import render_instruction, render_preference

_IDS = List(Value("int32"))
_SFT_FEATURES = Features({"id": Value("string"), "input_ids": _IDS, "labels": _IDS})
_DPO_FEATURES = Features({"id": Value("string"), "prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS})
RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


def format_instructions(
    splits: dict[str, list[InstructionRow]], tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> tuple[DatasetDict, list[Quarantined]]:
    """`input_ids` and `labels` of each row (lists of the row's length), by split, and what was set aside.

    Raises:
        WorkError: a row cannot be rendered, is over-long under `over_long: raise`, or no row of a split is left.
    """

    def tokenise(row: InstructionRow) -> tuple[dict[str, Any], int]:
        tokens = render_instruction(row, tokenizer)
        return {"id": row.id, "input_ids": tokens.input_ids, "labels": tokens.labels}, len(tokens.input_ids)

    return _format(splits, tokenise, tokenizer, config, "instruction", _SFT_FEATURES)


def format_preferences(
    splits: dict[str, list[PreferenceRow]], tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> tuple[DatasetDict, list[Quarantined]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of each row, by split, and what was set aside.

    Raises:
        WorkError: as `format_instructions`.
    """

    def tokenise(row: PreferenceRow) -> tuple[dict[str, Any], int]:
        pair = render_preference(row, tokenizer)
        return {"id": row.id, **pair._asdict()}, len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))

    return _format(splits, tokenise, tokenizer, config, "preference", _DPO_FEATURES)


def _format(
    splits: dict[str, list[RowT]],
    tokenise: Callable[[RowT], tuple[dict[str, Any], int]],
    tokenizer: PreTrainedTokenizerBase,
    config: FormattingConfig,
    stage: str,
    features: Features,
) -> tuple[DatasetDict, list[Quarantined]]:
    formatted = DatasetDict()
    quarantine: list[Quarantined] = []
    for name in SPLITS:
        kept = []
        for row in splits[name]:
            special = _spelt_special_token(row, tokenizer)
            if special:
                detail = f"its text spells {special}, which the tokenizer would read as the token itself"
                quarantine.append(_rejected(row, stage, "special_token_in_text", detail))
                continue
            record, length = tokenise(row)
            if length > config.max_length:
                detail = f"{length} tokens, formatting.max_length is {config.max_length}"
                if config.over_long == "raise":
                    raise WorkError(
                        f"Row {row.id} ({row.source}) is over-long: {detail}, and formatting.over_long is raise. "
                        "Raise max_length, shorten the row, or set over_long to drop."
                    )
                quarantine.append(_rejected(row, stage, "over_long", detail))
                continue
            kept.append(record)
        if not kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason(quarantine).items())
            raise WorkError(
                f"All {len(splits[name])} rows of the {name} split were set aside while formatting ({reasons}). "
                "If they are over-long, raise formatting.max_length."
            )
        formatted[name] = Dataset.from_list(kept, features=features)
    return formatted, quarantine


def _spelt_special_token(row: InstructionRow | PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> str:
    completions = [row.completion] if isinstance(row, InstructionRow) else [row.chosen, row.rejected]
    texts: Sequence[str] = [m.content for messages in (row.prompt, *completions) for m in messages]
    return next((t for t in tokenizer.all_special_tokens if any(t in text for text in texts)), "")


def _rejected(row: InstructionRow | PreferenceRow, stage: str, reason: str, detail: str) -> Quarantined:
    text = row.prompt[-1].content[:200]
    return Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)
