"""Several answers to one question become pairs, the best answer against each worse one."""

import pytest

from tests.unit.data.formats.records import opened


@pytest.mark.parametrize(
    ("record", "pairs"),
    [
        ({"instruction": "Hi", "output": ["A", "B", "C"]}, ["A>B", "A>C"]),
        ({"prompt": "Hi", "responses": ["A", "B", "C", "D"], "scores": [1, 3, 2, 3]}, ["B>C", "B>A"]),
        ({"prompt": "Hi", "responses": '["A", "B"]', "ranks": "[2, 1]"}, ["B>A"]),
        ({"prompt": "Hi", "completions": [{"response": "A", "score": 1}, {"response": "B", "score": 2}]}, ["B>A"]),
        ({"prompt": "Hi", "chosen": ["A"], "rejected": ["B", "C"]}, ["A>B", "A>C"]),
        ({"prompt": "Hi", "chosen": "A", "rejected": ["B"]}, ["A>B"]),
    ],
)
def test_several_answers_become_pairs(tmp_path, record, pairs):
    _, rows = opened(tmp_path, [record], None)
    assert [f"{row.chosen[0].content}>{row.rejected[0].content}" for row in rows] == pairs
    assert len({row.source for row in rows}) == len(pairs)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi", "responses": ["A", "B"], "scores": [1, 1]}, "equal_scores"),
        ({"prompt": "Hi", "responses": ["A", "B"], "scores": [1]}, "malformed"),
        ({"prompt": "Hi", "responses": ["A", "B"]}, "malformed"),
    ],
)
def test_answers_without_an_order_become_no_pairs(tmp_path, record, reason):
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    _, rows = opened(tmp_path, [good, record], "preference")
    assert [row.reason for row in rows[1:]] == [reason]
