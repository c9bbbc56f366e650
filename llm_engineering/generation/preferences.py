"""Writes preference rows from instruction rows: the row's answer is chosen, an answer of the client is rejected."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from llm_engineering.data.private import redacted
from llm_engineering.data.rows import (
    AT_LAST_SENTENCE,
    QUOTED_CHARS,
    REPLAY,
    InstructionRow,
    Message,
    PreferenceRow,
    Quarantined,
)
from llm_engineering.documents.sentences import rejected_end
from llm_engineering.generation.instructions import FROM_DOCUMENT
from llm_engineering.generation.types import Client, Failure, Sampling
from llm_engineering.recipe.generation_blocks import PreferenceWriting


def generate_preferences(
    rows: Sequence[InstructionRow],
    documents: Mapping[str, str],
    client: Client,
    writing: PreferenceWriting,
    seed: int,
) -> tuple[list[PreferenceRow], list[Quarantined]]:
    """Have the client write a rejected answer to the prompt of each usable row, or of those that are drawn.

    Three kinds of rows are set aside: those without a rejected answer, those that claim to quote their document and do not,
    and general rows (`data.replay_instructions`).
    With `max_preferences`, the seed draws that many of the usable rows.

    A rejected answer that was cut ends at its last whole sentence, unless `rejected_cut` says otherwise. The trainer writes
    the end token after it, and DPO would learn from the pair that an answer must not stop within a word.

    Args:
        documents: each document's text by its name; empty if the rows were not generated.
    """
    # A rule may have masked personal data in the answer, so the document is also searched with the same masks.
    searched = {name: _one_spaced(text) + "\n" + _one_spaced(redacted(text)) for name, text in documents.items()}
    quarantine: list[Quarantined] = []
    usable: list[InstructionRow] = []
    for row in rows:
        if row.origin == REPLAY:
            quarantine.append(_quarantined(row, "replay", "a row of data.replay_instructions is only for instructions"))
            continue
        is_verbatim = _one_spaced(row.completion[0].content) in searched.get(row.document, "")
        if documents and row.origin.endswith(FROM_DOCUMENT) and not is_verbatim:
            detail = f"the chosen answer is not in {row.document}"
            quarantine.append(_quarantined(row, "not_verbatim", detail, row.completion[0].content))
        else:
            usable.append(row)
    drawn = usable
    if writing.max_preferences is not None and len(usable) > writing.max_preferences:
        chosen = set(random.Random(seed).sample(range(len(usable)), writing.max_preferences))
        drawn = [row for index, row in enumerate(usable) if index in chosen]
        detail = f"generation.max_preferences is {writing.max_preferences}"
        quarantine += [_quarantined(row, "not_drawn", detail) for i, row in enumerate(usable) if i not in chosen]
    requests = [[message.model_dump() for message in row.prompt] for row in drawn]
    sampling = Sampling(writing.rejected_max_new_tokens, writing.rejected_temperature, seed)
    pairs: list[PreferenceRow] = []
    for row, outcome in zip(drawn, client.answer(requests, sampling, "rejected answers"), strict=True):
        if isinstance(outcome, Failure):
            quarantine.append(_quarantined(row, outcome.reason, outcome.detail, outcome.text))
            continue
        text, origin = outcome.text, f"chosen: {row.origin}; rejected by {client.identity}"
        if outcome.is_cut:
            text = rejected_end(outcome.text, writing.rejected_cut)
            origin += f", {AT_LAST_SENTENCE}" if writing.rejected_cut != "keep" else ""
        if outcome.is_cut and not text:
            limit = f"generation.rejected_max_new_tokens is {writing.rejected_max_new_tokens}"
            quarantine.append(_quarantined(row, "rejected_cut", limit, outcome.text))
            continue
        pairs.append(
            PreferenceRow(
                prompt=row.prompt,
                chosen=row.completion[:1],
                rejected=[Message(role="assistant", content=text)],
                source=row.source,
                origin=origin,
                document=row.document,
            )
        )
    return pairs, quarantine


def _one_spaced(text: str) -> str:
    """The text with each run of white space as one space."""
    return " ".join(text.split())


def _quarantined(row: InstructionRow, reason: str, detail: str, text: str = "") -> Quarantined:
    return Quarantined(
        stage="preference", reason=reason, source=row.source, place=row.id, detail=detail, text=text[:QUOTED_CHARS]
    )
