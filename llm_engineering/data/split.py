"""Splits rows so that all rows of one document fall on one side, and stay there when data is added later."""

from __future__ import annotations

import hashlib

from llm_engineering.config import SplitConfig
from llm_engineering.data.duplicates import normalised
from llm_engineering.data.rows import InstructionRow, PreferenceRow

# From what is trained on to what is held out most.
SPLITS = ("train", "validation", "test")


def split_key(row: InstructionRow | PreferenceRow) -> str:
    """What decides a row's split: its document, or its prompt with case, punctuation and space folded."""
    return row.document or prompt_text(row)


def split_of(key: str, config: SplitConfig, has_own_test: bool = False) -> str:
    """The split of a key: its SHA-256 as a number in [0, 1), the test share first, then validation.

    It depends on the key alone, so a row never changes sides when other rows come or go. With a test split of the
    user's own, the test share is trained on.
    """
    position = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8]) / 2**64
    if position < config.test_fraction:
        return "train" if has_own_test else "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


def prompt_text(row: InstructionRow | PreferenceRow) -> str:
    """The prompt with case, punctuation and space folded; as it is where it is nothing but punctuation."""
    text = "\n".join(message.content for message in row.prompt)
    return normalised(text) or text


def row_text(row: InstructionRow | PreferenceRow) -> str:
    """What near duplicates are judged by: the prompt and the answer that is learned."""
    answer = row.completion if isinstance(row, InstructionRow) else row.chosen
    return "\n".join(message.content for message in (*row.prompt, *answer))
