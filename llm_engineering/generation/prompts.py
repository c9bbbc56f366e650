"""The prompts, each a file of its own, versioned by the hash of its text."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "prompts"
PROMPT_FILES = tuple(sorted(FOLDER.glob("*.txt")))


def read_prompt(name: str) -> str:
    """The text of a prompt, with `{title}`, `{passage}` and the like in it."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip()


def prompt_hash(name: str) -> str:
    """Version of a prompt: the hash of its file."""
    return hashlib.sha256((FOLDER / f"{name}.txt").read_bytes()).hexdigest()[:12]
