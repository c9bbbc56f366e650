"""The made-up rows of the benchmarks have exactly the promised faults."""

import json
import re

import pytest

from benchmarks.alpaca_rows import Shares, write_rows

LINES = 10_000  # more than two chunks of rows


def shingles(text):
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def jaccard(one, other):
    return len(one & other) / len(one | other)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    counts = write_rows(file, LINES, seed=3)
    return counts, file.read_text(encoding="ascii").splitlines()


def test_counts_are_the_shares_of_the_lines(written):
    counts, lines = written
    assert len(lines) == counts.lines == LINES
    assert (counts.exact_duplicate, counts.near_duplicate, counts.empty_answer) == (500, 500, 100)
    assert (counts.refusal, counts.email, counts.broken, counts.plain) == (50, 100, 10, 8740)


def test_the_file_has_each_fault_as_often_as_counted(written):
    counts, lines = written
    rows, broken = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            broken += 1
    assert broken == counts.broken
    assert all(row.keys() == {"instruction", "input", "output", "document"} for row in rows)
    assert sum(row["output"] == "" for row in rows) == counts.empty_answer
    assert sum(row["output"].startswith("I'm sorry") for row in rows) == counts.refusal
    assert sum(bool(re.search(r"\w+\.\w+@\w+\.com$", row["output"])) for row in rows) == counts.email
    contents = [(row["instruction"], row["output"]) for row in rows]
    assert len(contents) - len(set(contents)) == counts.exact_duplicate
    assert len({row["document"] for row in rows}) == pytest.approx(LINES / 20, rel=0.01)

    # A near duplicate has another last word in its answer. All other rows with the same prompt are exact duplicates.
    first: dict[str, str] = {}
    near = []
    for prompt, answer in dict.fromkeys(contents):
        if prompt in first:
            near.append((f"{prompt} {first[prompt]}", f"{prompt} {answer}"))
        else:
            first[prompt] = answer
    assert len(near) == counts.near_duplicate
    assert all(0.94 < jaccard(shingles(one), shingles(other)) < 1 for one, other in near)


def test_unrelated_rows_are_not_near_duplicates(written):
    _, lines = written
    rows = [json.loads(line) for line in lines[:400] if line.endswith("}")]
    sets = list({row["instruction"]: shingles(f"{row['instruction']} {row['output']}") for row in rows}.values())
    most = max(jaccard(one, other) for i, one in enumerate(sets) for other in sets[:i])
    assert most < 0.2


def test_answers_have_the_stated_number_of_words(written):
    _, lines = written
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    words = [len(row["output"].split()) for row in rows if row["output"] and "sorry" not in row["output"]]
    assert (min(words), max(words)) == (30, 121)  # 120 words and an e-mail address


def test_the_same_seed_writes_the_same_file(tmp_path):
    write_rows(tmp_path / "a.jsonl", 500, seed=1)
    write_rows(tmp_path / "b.jsonl", 500, seed=1)
    write_rows(tmp_path / "c.jsonl", 500, seed=2)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_shares_without_plain_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no plain row"):
        write_rows(tmp_path / "a.jsonl", 10, shares=Shares(exact_duplicate=1.0))
