"""Preference rows from instruction rows: chosen is the document's answer, rejected the model's own."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.generation.local import LocalModel


def generate_preferences(
    rows: Sequence[InstructionRow],
    model: LocalModel,
    max_new_tokens: int,
    temperature: float,
    max_rows: int | None,
    seed: int,
) -> tuple[list[PreferenceRow], list[Quarantined]]:
    """Let the model answer each row's prompt. With `max_rows`, that many rows are drawn with the seed."""
    quarantine: list[Quarantined] = []
    drawn = list(rows)
    if max_rows is not None and len(rows) > max_rows:
        chosen = set(random.Random(seed).sample(range(len(rows)), max_rows))
        drawn = [row for index, row in enumerate(rows) if index in chosen]
        quarantine = [
            Quarantined(
                stage="preference",
                reason="not_drawn",
                source=row.source,
                place=row.id,
                detail=f"generation.max_preferences is {max_rows}",
            )
            for index, row in enumerate(rows)
            if index not in chosen
        ]
    requests = [[message.model_dump() for message in row.prompt] for row in drawn]
    answers = model.answer(requests, max_new_tokens, "rejected answers", temperature=temperature, seed=seed)
    made = [
        PreferenceRow(
            prompt=row.prompt,
            chosen=row.completion[:1],
            rejected=[Message(role="assistant", content=answer)],
            source=row.source,
            origin=f"chosen: {row.origin}; rejected by {model.identity}",
            document=row.document,
        )
        for row, answer in zip(drawn, answers, strict=True)
    ]
    return made, quarantine
