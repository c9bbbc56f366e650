"""The held-out rows that every model is measured on, as this recipe renders them, or as another model's tokenizer does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, PreferenceRow
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.measures import Labelled, labelled_answer, labelled_answers, labelled_rows
from llm_engineering.formatting.render import CrossingTokensError, Pair, Tokens, render

RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


class HeldOutRow(NamedTuple, Generic[RowT]):
    """A row and what is scored of it.

    Attributes:
        answers: ids and labels of its answer; of a pair, those of the chosen and of the rejected one.
        cut: whether formatting has cut off its end.
    """

    row: RowT
    answers: list[Labelled]
    cut: bool


class HeldOut(NamedTuple):
    """Held-out instruction rows, and pairs where there are any.

    Attributes:
        left_out: how many more could not be given to every model.
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
    """The rows of the formatted test splits; those that formatting has set aside are in none.

    Args:
        rows, pairs: of the datasets that were formatted.
    """
    rows_by_id, pairs_by_id = {row.id: row for row in rows}, {pair.id: pair for pair in pairs}
    asked = [
        HeldOutRow(rows_by_id[name], [labelled], cut)
        for name, labelled, cut in zip(
            formatted_sft["id"], labelled_rows(formatted_sft), formatted_sft["truncated"], strict=True
        )
    ]
    if formatted_dpo is None:
        return HeldOut(asked, [])
    compared = [
        HeldOutRow(pairs_by_id[name], list(answers), cut)
        for name, cut, *answers in zip(
            formatted_dpo["id"],
            formatted_dpo["truncated"],
            labelled_answers(formatted_dpo, "chosen"),
            labelled_answers(formatted_dpo, "rejected"),
            strict=True,
        )
    ]
    return HeldOut(asked, compared)


def drawn(rows: Sequence[HeldOutRow[InstructionRow]], count: int, seed: int) -> list[int]:
    """Places of the rows that are answered by every model: drawn, because rows of one document stand together."""
    return sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def rendered_for_both(ours: HeldOut, tokenizer: PreTrainedTokenizerBase) -> tuple[HeldOut, HeldOut]:
    """The rows as this recipe renders them and as another model's tokenizer does, without those that only one can.

    A row that was cut is nothing to another tokenizer, unless it renders the same, and a row may have no border between
    prompt and answer for it.

    Raises:
        WorkError: no row is left, or no pair of some.
    """
    rows, their_rows = _both(ours.rows, tokenizer)
    pairs, their_pairs = _both(ours.pairs, tokenizer)
    if not rows or (ours.pairs and not pairs):
        raise WorkError(
            f"Of the held-out rows none can be given to the tokenizer of {tokenizer.name_or_path} as well, so the model "
            "in production cannot be compared. With formatting.over_long: drop no row is cut."
        )
    left_out = len(ours.rows) - len(rows) + len(ours.pairs) - len(pairs)
    return HeldOut(rows, pairs, left_out), HeldOut(their_rows, their_pairs, left_out)


def _both(
    ours: Sequence[HeldOutRow[RowT]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[HeldOutRow[RowT]], list[HeldOutRow[RowT]]]:
    kept, theirs = [], []
    for row, rendered in zip(ours, render([row.row for row in ours], tokenizer), strict=True):
        if isinstance(rendered, CrossingTokensError):
            continue
        answers = _answers(rendered)
        is_alike = all(
            own[0][: len(of_ours[0])] == of_ours[0] for own, of_ours in zip(answers, row.answers, strict=True)
        )
        if is_alike or not row.cut:
            kept.append(row)
            theirs.append(row if is_alike else HeldOutRow(row.row, answers, cut=False))
    return kept, theirs


def _answers(rendered: Tokens | Pair) -> list[Labelled]:
    if isinstance(rendered, Tokens):
        return [(rendered.input_ids, rendered.labels)]
    return [labelled_answer(rendered.prompt_ids, ids) for ids in (rendered.chosen_ids, rendered.rejected_ids)]
