"""Filters over tables of Arrow."""

from __future__ import annotations

import numpy as np
from datasets import concatenate_datasets

from llm_engineering.data.rows import InstructionRow, Message, PromptRow, TextRow
from llm_engineering.data.storage import rows_dataset
from llm_engineering.review.browse import Filter, Table


def row(number, answer=""):
    return InstructionRow(
        prompt=[Message(role="user", content=f"Question {number}?")],
        completion=[Message(role="assistant", content=answer or f"Answer {number}.", reasoning_content="Straße")],
        source=f"doc{number % 100}.md:characters {number}-{number + 9}",
        origin="m",
        document=f"doc{number % 100}.md",
    )


def table(rows, kind="instruction"):
    return Table({"train": rows_dataset(rows, kind)})


def test_text_is_found_in_every_column_in_any_case():
    rows = table([row(1), row(2, "Übung macht"), row(3)])
    assert rows.holding("question 2").tolist() == [1]
    assert rows.holding("ÜBUNG").tolist() == [1]
    assert rows.holding("straße").tolist() == [0, 1, 2]
    assert rows.holding("doc3.md").tolist() == [2]
    assert rows.holding(row(3).id).tolist() == [2]
    assert rows.holding(".*").tolist() == []


def test_prompts_and_texts_are_found():
    prompts = [PromptRow(prompt=[Message(role="user", content="Q?")], answers=["one", "two"], source="s", origin="m")]
    assert table(prompts, "prompt").holding("TWO").tolist() == [0]
    assert table(prompts, "prompt").chars.tolist() == [8]
    texts = [TextRow(text="héllo", source="s", origin="m"), TextRow(text="", source="s", origin="m")]
    assert table(texts, "text").holding("HÉL").tolist() == [0]
    assert table(texts, "text").chars.tolist() == [5, 0]


def test_splits_follow_each_other_and_selected_rows_are_read():
    first = rows_dataset([row(number) for number in range(5)], "instruction")
    second = concatenate_datasets([first.select([4, 0]), first])
    rows = Table({"train": first.select([3, 1]), "validation": first.select([]), "test": second})
    assert rows.rows == 9
    assert [record["prompt"][0]["content"] for record in rows.records([0, 1, 2, 8])] == [
        f"Question {number}?" for number in (3, 1, 4, 4)
    ]
    assert [rows.part_of(position) for position in (0, 1, 2, 8)] == ["train", "train", "test", "test"]
    assert Filter(split="test").rows(rows, (), {}, "id").tolist() == list(range(2, 9))
    assert Filter(split="validation").rows(rows, (), {}, "id").tolist() == []


def test_filters_narrow_each_other():
    rows = table([row(number, "x" * number) for number in range(1, 10)])
    ids = [record["id"] for record in rows.records(rows.all)]
    decided = {ids[0]: "accept", ids[4]: "drop"}

    def shown(**fields):
        return Filter(**fields).rows(rows, [ids[2]], decided, "id").tolist()

    assert shown() == list(range(9))
    assert shown(decision="any") == [0, 4]
    assert shown(decision="drop") == [4]
    assert shown(decision="none", most=int(rows.chars[4])) == [1, 2, 3]
    assert shown(least=int(rows.chars[7])) == [7, 8]
    assert shown(finding="secret") == [2]
    assert shown(source="DOC4") == [3]
    assert shown(search="nowhere") == []


def test_an_empty_table_has_no_rows():
    rows = table([])
    assert (rows.rows, rows.holding("a").tolist(), rows.counts("source"), rows.chars.tolist()) == (0, [], {}, [])
    assert np.array_equal(Filter(search="a", least=1).rows(rows, (), {}, "id"), [])
