"""Checks the labels of each row before training, also of data that another program formatted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import IGNORE_INDEX

TRAINED_SPLITS = ("train", "validation")


def check_labels(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False) -> None:
    """Check every row of the training and validation splits.

    - Each row has a trained token, and each label is the token id at its position or -100.
    - No token of the prompt is trained, or, with `train_on_prompt`, every token of the row is. Without a column
      `prompt_tokens`, the tokens before the first trained one are the prompt, and there must be at least one.
    - Every trained answer ends with the end-of-turn token, except the last answer of a `truncated` row.
    - A pair has a prompt and two different, non-empty answers. A prompt alone is not empty.

    Args:
        data: splits of instruction rows (`input_ids`, `labels`) or of pairs (`prompt_ids`, `chosen_ids`,
            `rejected_ids`).

    Raises:
        WorkError: names the first wrong row and its problem.
    """
    end = int(tokenizer.eos_token_id)
    for split in TRAINED_SPLITS:
        for number, row in enumerate(data[split].with_format("numpy")):
            if "answers" in row:
                problem = "" if len(row["prompt_ids"]) else "it has no prompt"
            elif "chosen_ids" in row:
                problem = _pair_problem(row, end)
            else:
                problem = _row_problem(row, end, train_on_prompt)
            if problem:
                name = f" ({row['id']})" if "id" in row else ""
                raise WorkError(
                    f"Row {number}{name} of the {split} split cannot be trained on: {problem}. "
                    "Format the data again with this model's tokenizer and recipe."
                )


def _row_problem(row: dict[str, Any], end: int, train_on_prompt: bool) -> str:
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels):
        return f"it has {len(ids)} tokens and {len(labels)} labels"
    trained = labels != IGNORE_INDEX
    if not trained.any():
        return "none of its tokens is trained"
    if (labels[trained] != ids[trained]).any():
        return "a label differs from the token at its position"
    if train_on_prompt:
        if not trained.all():
            return "formatting.train_on_prompt is true, but not all of its tokens are trained"
    elif trained[: max(1, int(row.get("prompt_tokens", 1)))].any():
        return "a token of its prompt is trained"
    # An answer ends where the next token is not trained, or at the end of the row.
    ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
    whole = ends[:-1] if row.get("truncated", False) else ends
    if (ids[whole] != end).any():
        return "an answer does not end with the end-of-turn token"
    return ""


def _pair_problem(row: dict[str, Any], end: int) -> str:
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    if not len(row["prompt_ids"]):
        return "it has no prompt"
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if not len(ids):
            return f"its {name} answer is empty"
        if ids[-1] != end and not row.get("truncated", False):
            return f"its {name} answer does not end with the end-of-turn token"
    return "its chosen and rejected answers are the same" if np.array_equal(chosen, rejected) else ""


def label_views(
    rows: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[list[tuple[str, bool]]]:
    """Decode rows of `(input_ids, labels)`. Returns the text of each token, and whether it is trained."""
    return [
        [
            (str(tokenizer.decode([token])), label != IGNORE_INDEX)
            for token, label in zip(input_ids, labels, strict=True)
        ]
        for input_ids, labels in rows
    ]
