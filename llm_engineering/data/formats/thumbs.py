"""Reads rows that judge an answer: a row of an instruction format with a label that says whether the answer is a good one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_engineering.data.formats.conversations import BadRowError
from llm_engineering.data.rows import Message

# The columns of a label: TRL's name, and LLaMA-Factory's.
LABELS = ("label", "kto_tag")
_GOOD = ("true", "1", "up", "thumbs up", "thumbsup", "+1", "good", "like", "liked", "desirable", "👍")
_BAD = ("false", "0", "down", "thumbs down", "thumbsdown", "-1", "bad", "dislike", "disliked", "undesirable", "👎")
_WORDS = {**dict.fromkeys(_GOOD, True), **dict.fromkeys(_BAD, False)}
# Skin tones, and the mark that asks for a coloured symbol.
_TONES = dict.fromkeys([*range(0x1F3FB, 0x1F400), 0xFE0F])


def label_of(value: Mapping[str, Any]) -> bool | None:
    """The label of a record; None if it has none, or one whose meaning is not certain, such as a number of stars."""
    label = next((value[name] for name in LABELS if value.get(name) is not None), None)
    # Python's True is equal to 1, and False to 0.
    if isinstance(label, bool | int | float) and label in (0, 1):
        return bool(label)
    if isinstance(label, str):
        return _WORDS.get(" ".join(label.translate(_TONES).lower().replace("_", " ").split()))
    return None


def read_label(value: Mapping[str, Any]) -> bool:
    """The label of a record.

    Raises:
        BadRowError: `no_label`.
    """
    label = label_of(value)
    if label is None:
        shown = next((f"`{name}` is {value[name]!r:.40}" for name in LABELS if value.get(name) is not None), "")
        raise BadRowError(
            "no_label",
            f"{shown or 'it has no `label`'}; a label is true or false, 1 or 0, or up or down, and data.columns.label maps the "
            "column of another name",
        )
    return label


def judged(fields: dict[str, list[Message]], format_name: str) -> dict[str, list[Message]]:
    """The messages of a record with a label. Of a whole conversation, the last answer is the judged one.

    Raises:
        BadRowError: `loss_weight`: a part of the completion has the weight 0.
    """
    prompt, completion = fields["prompt"], fields["completion"]
    if format_name != "prompt-completion":
        prompt, completion = [*prompt, *completion[:-1]], completion[-1:]
    if not all(turn.is_trained for turn in completion if turn.role == "assistant"):
        raise BadRowError(
            "loss_weight", "a part of its completion has the weight 0; a label judges the whole completion"
        )
    return {"prompt": prompt, "completion": completion}
