"""Reads general instruction rows, which are added to the instructions so that a model forgets less."""

from __future__ import annotations

import random
from collections.abc import Iterator

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.reading.sources import dataset_hash
from llm_engineering.data.rows import REPLAY, Quarantined, Row
from llm_engineering.documents.read import HANDBOOK
from llm_engineering.recipe.data_blocks import EMBEDDED_GENERAL, DataConfig

EMBEDDED_FILE = HANDBOOK / "general.jsonl"
# With 69 general questions for the 69 about a small company, right general answers fell from 0.60 to 0.42.
_FEWEST = 200
# The embedded file has the columns `question` and `answer`.
_EMBEDDED_COLUMNS = {"instruction": "question"}


def replayed_instructions(reference: str | None) -> Iterator[Row | Quarantined]:
    """The rows of `data.replay_instructions` with the origin `replay`, or why a record is none; nothing for None.

    The format is detected: `data.format` and `data.columns` describe the user's own dataset.

    Raises:
        RequestError: the dataset is missing, empty or in no known format of instructions.
    """
    if reference is None:
        return
    columns = _EMBEDDED_COLUMNS if reference == EMBEDDED_GENERAL else {}
    config = DataConfig.model_validate({"columns": columns})
    for row in open_dataset(_path(reference), "instruction", config).rows:
        changed = {"stage": "instruction"} if isinstance(row, Quarantined) else {"origin": REPLAY}
        yield row.model_copy(update=changed)


def balanced_instructions(reference: str | None, rows: int, seed: int) -> list[Row | Quarantined]:
    """As `replayed_instructions`, but of the embedded questions at most as many as `rows` or 200, drawn with the seed.

    More of them would take most of the training steps where few documents give few questions.
    """
    found = list(replayed_instructions(reference))
    most = max(rows, _FEWEST)
    if reference == EMBEDDED_GENERAL and len(found) > most:
        return random.Random(seed).sample(found, most)
    return found


def check_replayed_instructions(reference: str | None) -> str | None:
    """Read the first row of the dataset, so that a wrong one is refused before the run; returns the dataset's hash.

    Raises:
        RequestError: the dataset is missing, empty or in no known format of instructions.
    """
    if reference is None:
        return None
    next(replayed_instructions(reference))
    return dataset_hash(_path(reference))


def _path(reference: str) -> str:
    return str(EMBEDDED_FILE) if reference == EMBEDDED_GENERAL else reference
