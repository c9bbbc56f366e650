"""The prompt files. A prompt's version is the hash of its file."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
PROMPT_FILES = tuple(sorted(FOLDER.glob("*.txt")))
# Files with examples of a sentence, a question and its answer. The second one asks in other words than the sentence.
FACT_EXAMPLES = ("fact", "fact_reworded")
# Examples of an answer from a sentence.
ANSWER_EXAMPLES = "fact_answer"


def read_prompt(name: str) -> str:
    """The text of a prompt, with placeholders such as `{title}` and `{passage}`."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip()


def prompt_hash(name: str) -> str:
    """The version of a prompt: 12 hex digits of the SHA-256 of its file."""
    return hashlib.sha256((FOLDER / f"{name}.txt").read_bytes()).hexdigest()[:12]
