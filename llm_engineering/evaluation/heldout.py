"""The held-out rows that every model is measured on, rendered by this recipe or by another model's tokenizer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Generic, NamedTuple, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, PreferenceRow, PromptRow, TextRow
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.models import Labelled, labelled_answer
from llm_engineering.formatting.columns import pieces
from llm_engineering.formatting.render import Pair, Tokens, UnrenderableError, render, text_tokens

RowT = TypeVar("RowT", TextRow, InstructionRow, PreferenceRow, PromptRow)
_TurnsT = TypeVar("_TurnsT", InstructionRow, PreferenceRow)


class HeldOutRow(NamedTuple, Generic[RowT]):
    """A held-out row with its rendered answers.

    Attributes:
        answers: ids and labels of the answer; for a pair, those of the chosen and of the rejected answer; for a text,
            those of its pieces.
        cut: whether formatting truncated the row.
    """

    row: RowT
    answers: list[Labelled]
    cut: bool


class HeldOut(NamedTuple):
    """The held-out instruction rows, and the pairs, texts and prompts, if there are any.

    Attributes:
        prompts: each prompt with its formatted record, which rewards read.
        left_out: number of rows and pairs left out because not every model's tokenizer can render them.
    """

    rows: list[HeldOutRow[InstructionRow]]
    pairs: list[HeldOutRow[PreferenceRow]]
    texts: Sequence[HeldOutRow[TextRow]] = ()
    left_out: int = 0
    prompts: Sequence[tuple[PromptRow, dict[str, Any]]] = ()


def held_out(formatted: Mapping[str, Dataset], rows: Mapping[str, Dataset]) -> HeldOut:
    """Join the formatted test splits with their rows. Rows that formatting set aside are not included.

    Args:
        formatted: the formatted test split of each kind of rows; a kind may be missing.
        rows: the test splits before formatting.
    """
    texts: dict[str, HeldOutRow[TextRow]] = {}
    for text, piece in _joined("text", formatted, rows, TextRow):
        texts.setdefault(text.id, HeldOutRow(text, [], cut=False)).answers.append((piece["input_ids"], piece["labels"]))
    joined = list(_joined("instruction", formatted, rows, InstructionRow))
    counts = Counter(row.id for row, _ in joined)
    # Where the template renders earlier answers differently, a conversation has one record for each of its answers.
    answers = {row.id: cycle(row.by_answer()) for row, _ in joined if counts[row.id] > 1}
    instructions = [
        HeldOutRow(
            next(answers[row.id]) if row.id in answers else row,
            [(record["input_ids"], record["labels"])],
            record["truncated"],
        )
        for row, record in joined
    ]
    preferences = [
        HeldOutRow(
            pair,
            [labelled_answer(record["prompt_ids"], record[key]) for key in ("chosen_ids", "rejected_ids")],
            record["truncated"],
        )
        for pair, record in _joined("preference", formatted, rows, PreferenceRow)
    ]
    prompts = list(_joined("prompt", formatted, rows, PromptRow))
    return HeldOut(instructions, preferences, list(texts.values()), prompts=prompts)


def _joined(
    kind: str, formatted: Mapping[str, Dataset], rows: Mapping[str, Dataset], row_class: type[RowT]
) -> Iterator[tuple[RowT, dict[str, Any]]]:
    """Each formatted record of a kind with its row."""
    if kind not in formatted:
        return
    by_id = {record["id"]: row_class.model_validate(record) for record in rows[kind]}
    for record in formatted[kind]:
        yield by_id[record["id"]], record


def draw_indices(rows: Sequence[Any], count: int, seed: int) -> list[int]:
    """Draw the indices of the rows that every model answers. The first rows would all be of one document."""
    return sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def render_for_both(ours: HeldOut, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[HeldOut, HeldOut]:
    """Render the rows for another model too. Returns the rows of this recipe and those of the other tokenizer.

    Both leave out rows that the other tokenizer cannot render: rows where one of its tokens spans the border of prompt
    and answer, and truncated rows, unless it renders them to the same tokens.

    Raises:
        WorkError: there are rows or pairs, and none of them is left.
    """
    rows, their_rows = _render_for_both(ours.rows, tokenizer)
    pairs, their_pairs = _render_for_both(ours.pairs, tokenizer)
    if (ours.rows and not rows) or (ours.pairs and not pairs):
        raise WorkError(
            f"The tokenizer of {tokenizer.name_or_path} can render none of the held-out rows or none of the pairs, so the "
            "model in production cannot be compared. Set formatting.over_long to drop: then no row is truncated."
        )
    left_out = len(ours.rows) - len(rows) + len(ours.pairs) - len(pairs)
    return HeldOut(rows, pairs, ours.texts, left_out, ours.prompts), HeldOut(
        their_rows, their_pairs, _texts_for(ours.texts, tokenizer, max_length), left_out, ours.prompts
    )


def _texts_for(
    texts: Sequence[HeldOutRow[TextRow]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[HeldOutRow[TextRow]]:
    if not texts:
        return []
    tokens = text_tokens([text.row for text in texts], tokenizer)
    return [
        HeldOutRow(text.row, [(part, part) for part in pieces(whole.input_ids, max_length)], cut=False)
        for text, whole in zip(texts, tokens, strict=True)
    ]


def _render_for_both(
    ours: Sequence[HeldOutRow[_TurnsT]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[HeldOutRow[_TurnsT]], list[HeldOutRow[_TurnsT]]]:
    shared, theirs = [], []
    for row, rendered in zip(ours, render([row.row for row in ours], tokenizer), strict=True):
        # A list is a conversation that this recipe's template renders as one, and the other one does not.
        if isinstance(rendered, UnrenderableError | list):
            continue
        answers = _answers(rendered)
        # A truncated row of this recipe is compared with the same number of ids of the other tokenizer.
        is_same = all(
            their_ids[: len(ids)] == ids for (their_ids, _), (ids, _) in zip(answers, row.answers, strict=True)
        )
        if is_same or not row.cut:
            shared.append(row)
            theirs.append(row if is_same else HeldOutRow(row.row, answers, cut=False))
    return shared, theirs


def _answers(rendered: Tokens | Pair) -> list[Labelled]:
    if isinstance(rendered, Tokens):
        return [(rendered.input_ids, rendered.labels)]
    return [labelled_answer(rendered.prompt_ids, ids) for ids in (rendered.chosen_ids, rendered.rejected_ids)]
