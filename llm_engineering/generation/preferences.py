"""Preference rows from instruction rows: chosen is the document's answer, rejected the model's own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.private import redacted
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.generation.instructions import FROM_DOCUMENT, RAW_CHARS
from llm_engineering.generation.types import Client, Failure, Sampling
from llm_engineering.recipe.generation_blocks import PreferenceWriting


def generate_preferences(
    rows: Sequence[InstructionRow],
    documents: Mapping[str, str],
    client: Client,
    writing: PreferenceWriting,
    seed: int,
) -> tuple[list[PreferenceRow], list[Quarantined]]:
    """Let the client answer each row's prompt. With `max_preferences`, that many rows are drawn with the seed.

    A row whose origin says that its answer is the document's must have it word for word, but for white space.

    Args:
        documents: the text of each document by its name; empty if the rows were not generated.
    """
    # A rule may have masked personal data in the answer: it then stands in the masked document.
    folded = {name: _folded(text) + "\n" + _folded(redacted(text)) for name, text in documents.items()}
    quarantine: list[Quarantined] = []
    usable: list[InstructionRow] = []
    for row in rows:
        is_verbatim = _folded(row.completion[0].content) in folded.get(row.document, "")
        if folded and row.origin.endswith(FROM_DOCUMENT) and not is_verbatim:
            detail = f"the chosen answer does not stand in {row.document}"
            quarantine.append(_rejected(row, "not_verbatim", detail, row.completion[0].content))
        else:
            usable.append(row)
    drawn = usable
    if writing.max_preferences is not None and len(usable) > writing.max_preferences:
        chosen = set(random.Random(seed).sample(range(len(usable)), writing.max_preferences))
        drawn = [row for index, row in enumerate(usable) if index in chosen]
        detail = f"generation.max_preferences is {writing.max_preferences}"
        quarantine += [_rejected(row, "not_drawn", detail) for index, row in enumerate(usable) if index not in chosen]
    requests = [[message.model_dump() for message in row.prompt] for row in drawn]
    sampling = Sampling(writing.rejected_max_new_tokens, writing.rejected_temperature, seed)
    made: list[PreferenceRow] = []
    for row, outcome in zip(drawn, client.answer(requests, sampling, "rejected answers"), strict=True):
        if isinstance(outcome, Failure):
            quarantine.append(_rejected(row, outcome.reason, outcome.detail, outcome.text))
            continue
        made.append(
            PreferenceRow(
                prompt=row.prompt,
                chosen=row.completion[:1],
                rejected=[Message(role="assistant", content=outcome.text)],
                source=row.source,
                origin=f"chosen: {row.origin}; rejected by {client.identity}",
                document=row.document,
            )
        )
    return made, quarantine


def _folded(text: str) -> str:
    return " ".join(text.split())


def _rejected(row: InstructionRow, reason: str, detail: str, text: str = "") -> Quarantined:
    return Quarantined(
        stage="preference", reason=reason, source=row.source, place=row.id, detail=detail, text=text[:RAW_CHARS]
    )
