"""The held-out rows that every model is measured on, rendered by this recipe or by another model's tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, PreferenceRow
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.models import Labelled, labelled_answer
from llm_engineering.formatting.render import CrossingTokensError, Pair, Tokens, render

RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


class HeldOutRow(NamedTuple, Generic[RowT]):
    """A held-out row with its rendered answers.

    Attributes:
        answers: ids and labels of the answer; for a pair, those of the chosen and of the rejected answer.
        cut: whether formatting truncated the row.
    """

    row: RowT
    answers: list[Labelled]
    cut: bool


class HeldOut(NamedTuple):
    """The held-out instruction rows, and the pairs, if there are any.

    Attributes:
        left_out: number of rows and pairs left out because not every model's tokenizer can render them.
    """

    rows: list[HeldOutRow[InstructionRow]]
    pairs: list[HeldOutRow[PreferenceRow]]
    left_out: int = 0


def held_out(
    formatted_sft: Dataset,
    rows: Sequence[InstructionRow],
    formatted_dpo: Dataset | None = None,
    pairs: Sequence[PreferenceRow] = (),
) -> HeldOut:
    """Join the formatted test splits with their rows. Rows that formatting set aside are not included.

    Args:
        rows, pairs: the test splits before formatting.
    """
    rows_by_id, pairs_by_id = {row.id: row for row in rows}, {pair.id: pair for pair in pairs}
    instructions = [
        HeldOutRow(rows_by_id[row["id"]], [(row["input_ids"], row["labels"])], row["truncated"])
        for row in formatted_sft
    ]
    preferences = [
        HeldOutRow(
            pairs_by_id[pair["id"]],
            [labelled_answer(pair["prompt_ids"], pair[key]) for key in ("chosen_ids", "rejected_ids")],
            pair["truncated"],
        )
        for pair in formatted_dpo or ()
    ]
    return HeldOut(instructions, preferences)


def draw_indices(rows: Sequence[HeldOutRow[InstructionRow]], count: int, seed: int) -> list[int]:
    """Draw the indices of the rows that every model answers. The first rows would all be of one document."""
    return sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def render_for_both(ours: HeldOut, tokenizer: PreTrainedTokenizerBase) -> tuple[HeldOut, HeldOut]:
    """Render the rows for another model too. Returns the rows of this recipe and those of the other tokenizer.

    Both leave out rows that the other tokenizer cannot render: rows where one of its tokens spans the border of prompt
    and answer, and truncated rows, unless it renders them to the same tokens.

    Raises:
        WorkError: no row is left, or there are pairs and none of them is left.
    """
    rows, their_rows = _render_for_both(ours.rows, tokenizer)
    pairs, their_pairs = _render_for_both(ours.pairs, tokenizer)
    if not rows or (ours.pairs and not pairs):
        raise WorkError(
            f"The tokenizer of {tokenizer.name_or_path} can render none of the held-out rows or none of the pairs, so the "
            "model in production cannot be compared. Set formatting.over_long to drop: then no row is truncated."
        )
    left_out = len(ours.rows) - len(rows) + len(ours.pairs) - len(pairs)
    return HeldOut(rows, pairs, left_out), HeldOut(their_rows, their_pairs, left_out)


def _render_for_both(
    ours: Sequence[HeldOutRow[RowT]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[HeldOutRow[RowT]], list[HeldOutRow[RowT]]]:
    shared, theirs = [], []
    for row, rendered in zip(ours, render([row.row for row in ours], tokenizer), strict=True):
        if isinstance(rendered, CrossingTokensError):
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
