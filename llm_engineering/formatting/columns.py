"""The columns of formatted rows of each kind."""

from __future__ import annotations

from typing import Any

from datasets import Features, List, Value

from llm_engineering.data.rows import LabelledRow, PromptRow, Row, TextRow
from llm_engineering.data.storage import FEATURES
from llm_engineering.formatting.prompt_rows import PromptTokens
from llm_engineering.formatting.render import Pair, Tokens, prompt_length
from llm_engineering.recipe.data_blocks import FormattingConfig

_IDS = List(Value("int32"))
_ROW = {"id": Value("string"), "truncated": Value("bool")}
_TOKEN_FEATURES = Features({**_ROW, "input_ids": _IDS, "labels": _IDS, "prompt_tokens": Value("int32")})
_PROMPT_FEATURES = Features(
    {**_ROW, "prompt_ids": _IDS, "prompt": FEATURES["prompt"]["prompt"], "answers": FEATURES["prompt"]["answers"]}
)
_PAIR_FEATURES = Features({**_ROW, "prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS})
_LABELLED_FEATURES = Features({**_ROW, "prompt_ids": _IDS, "completion_ids": _IDS, "label": Value("bool")})
COLUMNS = {
    "text": _TOKEN_FEATURES,
    "instruction": _TOKEN_FEATURES,
    "preference": _PAIR_FEATURES,
    "labelled": _LABELLED_FEATURES,
    "prompt": _PROMPT_FEATURES,
}


def pieces(ids: list[int], max_length: int) -> list[list[int]]:
    """Divide a text into the fewest pieces of at most `max_length` tokens, of equal length but for one token."""
    count = -(-len(ids) // max_length)
    ends = [len(ids) * (number + 1) // count for number in range(count)]
    return [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def piece_records(row: TextRow, tokens: Tokens, max_length: int) -> list[dict[str, Any]]:
    """A record for each piece of a text. The text continues after every piece but the last: these are `truncated`."""
    parts = pieces(tokens.input_ids, max_length)
    return [
        {"id": row.id, "truncated": part is not parts[-1], "input_ids": part, "labels": part, "prompt_tokens": 0}
        for part in parts
    ]


def row_record(
    row: Row, tokens: Tokens | Pair | PromptTokens, config: FormattingConfig, truncated: bool
) -> dict[str, Any]:
    """The record of a row that stays in one piece. `truncated` says whether it was cut."""
    if isinstance(row, LabelledRow):
        assert isinstance(tokens, Tokens)
        start = prompt_length(tokens)
        ids = {"prompt_ids": tokens.input_ids[:start], "completion_ids": tokens.input_ids[start:]}
        return {"id": row.id, "truncated": truncated, **ids, "label": row.label}
    record: dict[str, Any] = {"id": row.id, "truncated": truncated, **tokens._asdict()}
    del record["respaced"]
    if isinstance(row, PromptRow):
        record |= {name: row.record()[name] for name in ("prompt", "answers")}
    if isinstance(tokens, Tokens):
        record["prompt_tokens"] = prompt_length(tokens)
        if config.train_on_prompt:
            record["labels"] = list(tokens.input_ids)
    return record
