"""Checking, judging and splitting: every row is kept or quarantined with its reason, in bounded memory."""

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.alpaca_rows import write_rows
from llm_engineering.data import examine, similarity
from llm_engineering.data.dataset_rules import document_limit, length_bounds, rare_languages
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.prepare import check_splits, prepare
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_row, split_of
from llm_engineering.data.similarity import (
    Clusters,
    EvaluationIndex,
    ShingleFile,
    band_count,
    groups,
    join_near_duplicates,
    sketch,
)
from llm_engineering.data.storage import TableWriter, dataset_batches, rows_dataset, stream_records
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig

CONFIG = DataConfig.model_validate({"split": {"validation_fraction": 0.2, "test_fraction": 0.2}})
FOX = "The quick brown fox jumps over the lazy dog near the old river bank every single morning in May"


def messages(role, text):
    return [Message(role=role, content=text)]


def row(prompt="Where is it?", answer="It is there.", source="s", document="", origin="human"):
    return InstructionRow(
        prompt=messages("user", prompt),
        completion=messages("assistant", answer),
        source=source,
        origin=origin,
        document=document,
    )


def pair(chosen, rejected, prompt="Where is it?", source="s"):
    return PreferenceRow(
        prompt=messages("user", prompt),
        chosen=messages("assistant", chosen),
        rejected=messages("assistant", rejected),
        source=source,
        origin="human",
    )


def document_on(side, number=0):
    """The name of a document whose rows go to the split `side`."""
    names = (f"document {i}" for i in itertools.count())
    return next(itertools.islice((n for n in names if split_of(n, CONFIG.split) == side), number, None))


class Run:
    """Runs `prepare` on rows, and holds its result."""

    def __init__(self, tmp_path, rows, config=CONFIG, own_test=None, evaluation=None, inspected=False):
        is_pair = isinstance(rows[0], PreferenceRow)
        self.kind = "preference" if is_pair else "instruction"
        self.ledger = Ledger()
        self.ledger.record(self.kind, len(rows), len(rows))
        test = rows_dataset(own_test, self.kind) if own_test is not None else None
        self.prepared = prepare(
            rows_dataset(rows, self.kind), self.kind, config, self.ledger, tmp_path, test, evaluation, inspected
        )
        self.quarantine = list(self.ledger.quarantine())

    def sources(self, *splits):
        return sorted(r["source"] for name in splits or self.prepared.splits for r in self.prepared.splits[name])

    def set_aside(self):
        return {q.source: q.reason for q in self.quarantine}

    def reported(self):
        return {(r["source"], r["rule"]) for r in self.prepared.findings}


def with_rules(**rules):
    return DataConfig.model_validate({**CONFIG.model_dump(), "rules": rules})


def test_empty_and_repeated_rows_are_set_aside_and_the_kept_row_is_named(tmp_path):
    answers = {"1": FOX, "2": FOX, "3": " ", "4": FOX + "!", "5": "Something else is said here."}
    run = Run(tmp_path, [row(answer=answer, source=source) for source, answer in answers.items()])
    assert run.sources() == ["1", "5"]
    assert run.set_aside() == {"2": "exact_duplicate", "3": "empty_answer", "4": "near_duplicate"}
    details = {q.source: q.detail for q in run.quarantine}
    assert details["2"] == "first seen at 1"
    assert details["4"] == "of the row at 1, with 2"
    fates = [(r["source"], r["fate"]) for r in run.prepared.clusters]
    assert fates == [("1", "kept"), ("2", "exact_duplicate"), ("4", "near_duplicate")]


def test_large_clusters_name_a_few_of_their_rows(tmp_path):
    run = Run(tmp_path, [row(answer=FOX + "!" * i, source=str(i)) for i in range(7)])
    assert run.sources() == ["0"]
    assert run.quarantine[0].detail == "of the row at 0, with 2, 3, 4 and 2 others"
    assert len(run.prepared.clusters) == 7


@pytest.mark.parametrize(
    ("switch", "kept", "reported"),
    [
        ("drop", ["1"], False),
        ("report", ["1", "2"], True),
        ("off", ["1", "2"], False),
        ("drop_generated", ["1", "2"], True),
    ],
)
def test_every_duplicate_rule_has_a_switch(tmp_path, switch, kept, reported):
    for rule, other in (("exact_duplicate", FOX), ("near_duplicate", FOX + "!")):
        folder = tmp_path / rule
        folder.mkdir()
        run = Run(folder, [row(answer=FOX, source="1"), row(answer=other, source="2")], with_rules(**{rule: switch}))
        assert run.sources() == kept
        assert run.reported() == ({("2", rule)} if reported else set())


def test_drop_generated_drops_what_a_model_wrote(tmp_path):
    rows = [row(answer=FOX, source="1"), row(answer=FOX, source="2", origin="some-model")]
    run = Run(tmp_path, rows, with_rules(exact_duplicate="drop_generated"))
    assert run.set_aside() == {"2": "exact_duplicate"}


def test_pairs_with_equal_or_empty_answers_are_set_aside(tmp_path):
    rows = [pair("Yes.", "no", source="1"), pair("Yes.", " yes", source="2"), pair("", "no", source="3")]
    run = Run(tmp_path, [*rows, pair("?", "!", "Other?", source="4")])
    assert run.sources() == ["1", "4"]
    assert run.set_aside() == {"2": "chosen_equals_rejected", "3": "empty_answer"}


def test_training_rows_that_resemble_held_out_rows_are_removed(tmp_path):
    train, test = document_on("train"), document_on("test")
    rows = [
        row("What does the fox do?", FOX, "near", train),
        row("What does the fox do?", FOX + " again", "held out", test),
        row("Who sleeps at noon?", "The lazy dog.", "same prompt", train),
        row("who SLEEPS at noon", "A cat, if there is one in the house.", "held out too", test),
        row("Unlike the others?", "Yes, it is nothing like them.", "fine", train),
    ]
    run = Run(tmp_path, rows)
    assert run.set_aside() == {"near": "leaks_into_test", "same prompt": "leaks_into_test"}
    assert run.sources("test") == ["held out", "held out too"]
    assert run.prepared.leaked == 2
    assert "held out" in run.quarantine[0].detail


def test_a_row_in_several_splits_stays_in_the_test_split(tmp_path):
    sides = {name: document_on(name) for name in ("train", "validation", "test")}
    run = Run(tmp_path, [row(answer=FOX, source=name, document=doc) for name, doc in sides.items()])
    assert run.set_aside() == {"train": "leaks_into_test", "validation": "leaks_into_test"}
    assert run.sources() == ["test"]


def test_inspection_counts_leaks_and_keeps_the_rows(tmp_path):
    rows = [row("A question?", FOX, "1"), row("Another one?", "Nothing like it at all.", "2")]
    other = [
        row("a question", "Answered otherwise.", "e1"),
        row("Unseen?", "Never seen before.", "e2"),
        row("A QUESTION", FOX, "e3"),
    ]
    run = Run(tmp_path, rows, own_test=other, inspected=True)
    assert run.sources("train") == ["1", "2"]
    assert run.prepared.leaked == 2
    again = Run(tmp_path, rows, own_test=rows, inspected=True)
    leaks = [r["source"] for r in again.prepared.findings if r["rule"] == "leaks_into_test"]
    assert leaks == ["1", "2"]


def test_own_test_split(tmp_path):
    rows = [row(f"Question number {i}?", f"Answer {i} of many, unlike.", str(i)) for i in range(60)]
    own = [row("Question number 7?", "Whatever.", "own 1"), row("Never asked?", "Fresh.", "own 2")]
    run = Run(tmp_path, rows, own_test=own)
    assert run.sources("test") == ["own 1", "own 2"]
    side = split_of("question number 7", CONFIG.split, has_own_test=True)
    assert run.set_aside() == {"7": "leaks_into_test"}, side
    assert len(run.sources("train", "validation")) == 59
    assert (run.ledger.kept["instruction"], run.ledger.kept["instruction_test"]) == (59, 2)
    strict = CONFIG.model_copy(update={"strict": True})
    with pytest.raises(RequestError, match=r"1 rows of the test split .* data.strict is on: 7 is like own 1"):
        Run(tmp_path, rows, strict, own_test=own)


def test_strict_accepts_a_test_split_without_leaks(tmp_path):
    rows = [row(f"Question number {i}?", f"Answer {i}.", str(i)) for i in range(20)]
    run = Run(tmp_path, rows, CONFIG.model_copy(update={"strict": True}), own_test=[row("Never?", "Fresh.", "own")])
    assert run.sources("test") == ["own"]


def test_decontamination_removes_only_training_rows(tmp_path):
    index = EvaluationIndex(5)
    index.add(row("Name the capital?", FOX, "evaluation"))
    train, test = document_on("train"), document_on("test")
    rows = [
        row("Tell of a fox.", f"Once upon a time: {FOX}. So it was.", "in training", train),
        row("Tell a tale.", f"Long, long ago, as they say: {FOX}, and more of that kind, on and on.", "held out", test),
        row("Tell nothing.", "There is nothing to tell of any fox.", "clean", train),
    ]
    run = Run(tmp_path, rows, evaluation=index)
    assert run.set_aside() == {"in training": "contaminated"}
    assert "decontaminate_against" in run.quarantine[0].detail


def test_conflicting_answers_are_reported_and_kept_by_default(tmp_path):
    rows = [
        row(answer="It is here.", source="1"),
        row(answer="it is here", source="2"),
        row(answer="Nowhere.", source="3"),
    ]
    run = Run(tmp_path, rows, with_rules(near_duplicate="off"))
    assert run.sources() == ["1", "2", "3"]
    assert run.reported() == {("3", "conflicting_answers")}
    dropped = Run(tmp_path, rows, with_rules(near_duplicate="off", conflicting_answers="drop"))
    assert dropped.set_aside() == {"3": "conflicting_answers"}


def test_pairs_of_one_answer_with_several_worse_ones_are_no_duplicates(tmp_path):
    worse = {"1": "No.", "2": "I will not say.", "3": "no"}
    run = Run(tmp_path, [pair(FOX, answer, source=source) for source, answer in worse.items()])
    assert run.set_aside() == {"3": "near_duplicate"}


def test_pairs_conflict_where_one_prefers_what_another_rejects(tmp_path):
    rows = [
        pair("A longer answer.", "Short.", source="1"),
        pair("Other one.", "No.", source="2"),
        pair("Short.", "Bad.", source="3"),
    ]
    assert Run(tmp_path, rows).reported() == {("3", "conflicting_answers")}


def test_suspicious_rows_are_those_that_match_most_rules(tmp_path):
    many = "Write to jane@post-office.net."
    rows = [row(f"Question {i}?", f"This answer has the number {i} in it.", f"{i}") for i in range(30)]
    rows[7] = row("What does the passage above say?", many, "two rules")
    rows[9] = row("Where to write?", many, "one rule")
    run = Run(tmp_path, rows)
    shown = list(run.prepared.suspicious)
    assert [r["source"] for r in shown] == ["two rules", "one rule"]
    assert "jane@" not in shown[0]["findings"]


def test_no_row_left_says_why(tmp_path):
    run = Run(tmp_path, [row(answer=" "), row(answer="")])
    with pytest.raises(RequestError, match="No instruction row is left.*2 empty_answer"):
        check_splits(run.prepared.splits, "instruction", run.ledger)
    run = Run(tmp_path, [row(document=document_on("train"))])
    with pytest.raises(RequestError, match="has 1 row, at least 20 are needed, and the validation and test split came"):
        check_splits(run.prepared.splits, "instruction", run.ledger)


def test_rows_stay_in_their_split_when_data_is_added(tmp_path):
    rows = [row(f"Question number {i}?", f"The answer to {i} is {i * 7}.", str(i), f"doc {i % 60}") for i in range(600)]
    before = {r["id"]: name for name, part in Run(tmp_path, rows[:300]).prepared.splits.items() for r in part}
    after = {r["id"]: name for name, part in Run(tmp_path, rows).prepared.splits.items() for r in part}
    assert before.items() <= after.items()
    sides = {}
    for r in rows:
        sides.setdefault(r.document, set()).add(after[r.id])
    assert all(len(names) == 1 for names in sides.values())
    assert set(after.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("counts", "limit"),
    [
        # 6 of 6 + 5 * 4 = 26 rows is less than a quarter; 7 of 27 is more.
        ([60, 4, 4, 4, 4, 4], 6),
        # Two large documents: 7 of 7 + 7 + 5 + 5 + 4 = 28 rows is a quarter.
        ([20, 12, 5, 5, 4], 7),
        # Rows without a document count: 10 of 10 + 30 rows is a quarter.
        ([40, *[1] * 30], 10),
        # No document has more than a quarter.
        ([5, 5, 5, 5], None),
        ([8, 6, 6, 4, *[1] * 27], None),
        # Three documents have more than a quarter each, whatever is set aside.
        ([9, 9, 9], None),
        ([1], None),
        ([], None),
        # Four documents would keep 4 rows each. The variance of a mean would rise from 49.6 / 576 = 0.086 to 0.100.
        ([8, 6, 6, 4], None),
        # Five documents would keep 2, 2, 2, 1 and 1 rows: from 0.068 to 0.144.
        ([100, 100, 100, 1, 1], None),
    ],
)
def test_no_document_has_more_than_a_quarter_of_a_held_out_split_where_fewer_rows_tell_as_much(counts, limit):
    assert document_limit(counts) == limit


def of_documents(side, counts, first=0):
    """Rows of documents of the split `side`, as many of each as `counts` says."""
    return [
        row(f"What is {side} {n}.{i}?", f"It is number {n * 1000 + i}.", f"{side} {n}.{i}", document_on(side, n))
        for n, count in enumerate(counts, first)
        for i in range(count)
    ]


def test_rows_over_a_quarter_of_a_held_out_split_are_set_aside_by_name(tmp_path):
    train = of_documents("train", [50, 1])
    rows = of_documents("test", [60, 4, 4, 4, 4, 4]) + of_documents("validation", [8, 6, 6, 4]) + train
    run = Run(tmp_path, rows)
    kept = Counter(r["document"] for r in run.prepared.splits["test"])
    assert kept == {document_on("test", 0): 6} | {document_on("test", n): 4 for n in range(1, 6)}
    assert run.ledger.by_reason("instruction") == {"document_over_quarter": 54}
    assert all(q.source.startswith("test 0.") for q in run.quarantine)
    assert {q.detail for q in run.quarantine} == {
        "the test split keeps 6 rows of each document, so that none has more than a quarter of it"
    }
    # The split that would tell less, and the training split, stay as they are.
    assert len(run.sources("validation")) == 24
    assert run.sources("train") == sorted(r.source for r in train)


def test_documents_that_are_added_to_a_held_out_split_change_neither_its_rows_nor_training(tmp_path):
    rows = of_documents("test", [60, 4, 4, 4, 4, 4]) + of_documents("validation", [2]) + of_documents("train", [5])
    (tmp_path / "before").mkdir()
    before = Run(tmp_path / "before", rows)
    after = Run(tmp_path, rows[::-1] + of_documents("test", [4, 4], first=6))
    # 9 of 9 + 7 * 4 = 37 rows is less than a quarter.
    assert len(after.sources("test")) == 37
    assert set(before.sources("test")) < set(after.sources("test"))
    assert before.sources("train", "validation") == after.sources("train", "validation")


def test_a_row_that_another_rule_drops_does_not_count_for_its_document(tmp_path):
    rows = of_documents("test", [5, 5, 5, 5, 5]) + of_documents("validation", [2])
    # With the repeated rows the first document would have 15 of 35 rows, and keep 6.
    repeated = [r.model_copy(update={"source": f"again {i}"}) for i, r in enumerate(rows[:5] * 2)]
    run = Run(tmp_path, rows + repeated)
    assert run.ledger.by_reason("instruction") == {"exact_duplicate": 10}


def test_the_same_question_in_another_case_goes_to_the_same_split(tmp_path):
    rows = [row(f"What is {i}?", f"This is {i}.", str(i)) for i in range(30)]
    rows += [row(f"WHAT is {i}", "Another answer altogether.", f"{i} again") for i in range(30)]
    sides = {r["source"]: name for name, part in Run(tmp_path, rows).prepared.splits.items() for r in part}
    assert len(sides) == 60
    assert all(sides[str(i)] == sides[f"{i} again"] for i in range(30))


def test_rows_are_unchanged_by_a_dataset():
    rows = [row(prompt="Ä 😀\n", answer="x")]
    assert [instruction_row(record) for record in rows_dataset(rows, "instruction")] == rows


def test_split_shares_are_those_of_the_recipe():
    sides = [split_of(str(random.Random(i).random()), CONFIG.split) for i in range(4000)]
    assert sides.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert sides.count("validation") / 4000 == pytest.approx(0.2, abs=0.02)


def test_several_processes_and_one_process_agree(tmp_path, monkeypatch):
    rng = random.Random(1)
    rows = [row(f"Question {rng.randrange(900)}?", f"{FOX} {rng.randrange(40)}", str(i)) for i in range(2500)]
    rows += [row(answer=" ", source="empty"), row("Mail?", "Mail to a@post-office.net.", "mail")]
    alone = Run(tmp_path, rows)
    monkeypatch.setattr(examine, "_ROWS_FOR_PROCESSES", 0)
    together = Run(tmp_path, rows)
    assert together.sources() == alone.sources()
    assert together.set_aside() == alone.set_aside()
    assert list(together.prepared.clusters) == list(alone.prepared.clusters)


def words(rng, count):
    return [f"word{rng.randrange(400)}" for _ in range(count)]


def test_near_duplicates_equal_those_of_an_exact_search(tmp_path):
    """Compares with the definition: the connected components of all pairs with a high Jaccard similarity."""
    rng = random.Random(3)
    texts = []
    for _ in range(60):
        base = words(rng, 60)
        texts.append(" ".join(base))
        for _ in range(rng.randrange(3)):
            changed = [word if rng.random() > 0.04 else "changed" for word in base]
            texts.append(" ".join(changed))
    rng.shuffle(texts)
    sets = [{tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in texts]
    expected = Clusters(len(texts))
    for i, j in itertools.combinations(range(len(texts)), 2):
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8:
            expected.join(i, j)
    assert sum(map(len, expected.members())) > 20
    found = near_duplicates(tmp_path, texts)
    assert list(found.members()) == list(expected.members())


def near_duplicates(folder, texts):
    sketches = sketch(texts, 0.8)
    bands = [folder / f"band-{k}" for k in range(sketches.bands.shape[1])]
    for k, path in enumerate(bands):
        sketches.bands[:, k].tofile(path)
    sketches.shingles.tofile(folder / "shingles")
    found = Clusters(len(texts))
    with ShingleFile(folder / "shingles", sketches.counts) as shingles:
        join_near_duplicates(found, bands, shingles, 0.8)
    return found


def test_scripts_without_spaces_have_words_too(tmp_path):
    text = "机器学习是人工智能的一个分支，它使计算机能够从数据中学习，而不需要明确编程。"
    texts = [text, text.replace("明确", "清楚"), "今天天气很好，我们去公园散步吧，然后在湖边喝一杯茶。", "?!", "!!"]
    assert list(near_duplicates(tmp_path, texts).members()) == []
    assert list(near_duplicates(tmp_path, [text * 3, text * 3 + "是"]).members()) == [[0, 1]]


def test_bands_find_a_pair_at_the_threshold():
    # By hand: with 25 bands of 5 values, 1 - (1 - 0.8^5)^25 = 0.99995; with 21 of 6 it is 0.9983.
    assert band_count(0.8) == 25
    assert all(1 - (1 - t ** (128 // band_count(t))) ** band_count(t) >= 0.999 for t in (0.3, 0.5, 0.7, 0.9, 0.99))


def test_groups_are_the_same_when_sorted_in_parts(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    values.tofile(tmp_path / "values")
    whole = sorted(group.tolist() for group in groups(tmp_path / "values"))
    monkeypatch.setattr(similarity, "_PART_ROWS", 70)
    assert sorted(group.tolist() for group in groups(tmp_path / "values")) == whole
    assert whole == sorted(
        np.flatnonzero(values == v).tolist() for v in set(values.tolist()) if (values == v).sum() > 1
    )


def test_length_bounds_are_far_from_the_usual_lengths():
    low, high = length_bounds(np.array([100, 120, 140, 160, 180, 200] * 20, np.uint32))
    assert low < 50
    assert 400 < high < 4000
    assert length_bounds(np.array([5, 5000], np.uint32)) == (0.0, float("inf"))


def test_rare_languages():
    assert rare_languages(["en", "", "de", "fr"], np.array([980, 500, 5, 60])) == {"de"}
    assert rare_languages(["en", "de"], np.array([50, 1])) == set()


def test_batches_of_a_view_hold_the_rows_of_the_view(tmp_path):
    table = TableWriter(tmp_path / "t.arrow", rows_dataset([], "instruction").features)
    for i in range(2500):
        table.write(row(source=str(i)).record())
    whole = table.dataset()
    for view, expected in (
        (whole, range(2500)),
        (whole.select(range(10, 20)), range(10, 20)),
        (whole.select([5, 3]), (5, 3)),
        (Dataset.from_list(list(whole.select([1]))), [1]),
        (whole.select_columns(["source"]), range(2500)),
    ):
        assert [r["source"] for r in stream_records(view)] == [str(i) for i in expected]
        assert list(next(stream_records(view))) == view.column_names
    assert max(batch.num_rows for batch in dataset_batches(whole)) <= 1000


def test_the_ledger_refuses_missing_rows():
    ledger = Ledger()
    ledger.record("instruction", 3, 3)
    with pytest.raises(AssertionError, match="expected 3 rows, read 3, kept 2, quarantined 0"):
        ledger.record("instruction", 3, 2)


def test_a_stored_ledger_can_be_loaded_and_continued(tmp_path):
    run = Run(tmp_path, [row(), row(), row(answer="")])
    stored = DatasetDict(run.ledger.datasets())
    again = Ledger.load(stored)
    assert (again.read, again.kept, again.reasons) == (run.ledger.read, run.ledger.kept, run.ledger.reasons)
    again.record("instruction", 1, 1)
    assert [json.dumps(q.model_dump()) for q in again.quarantine()] == [
        json.dumps(q.model_dump()) for q in run.quarantine
    ]


def read_and_prepare(folder, file):
    """Read and prepare a file; the ledger checks that kept + quarantined = read."""
    ledger = Ledger()
    loaded = load_rows(str(file), "instruction", DataConfig(), folder / "rows.arrow", ledger)
    prepared = prepare(loaded.rows, "instruction", CONFIG, ledger, folder)
    return ledger, prepared


def test_every_planted_fault_is_found(tmp_path):
    made = write_rows(tmp_path / "rows.jsonl", 6000, seed=5)
    ledger, prepared = read_and_prepare(tmp_path, tmp_path / "rows.jsonl")
    found = Counter(ledger.by_reason("instruction"))
    leaks = found["leaks_into_test"] + found["leaks_into_validation"]
    assert (found["malformed"], found["empty_answer"]) == (made.broken, made.empty_answer)
    assert found["exact_duplicate"] + found["near_duplicate"] + leaks == made.exact_duplicate + made.near_duplicate
    rules = Counter(record["rule"] for record in prepared.findings)
    assert (rules["refusal"], rules["personal_data"]) == (made.refusal, made.email)
    assert ledger.read["instruction"] == 6000


WORDS = st.one_of(
    st.text(max_size=30), st.sampled_from(["", "Same?", "same", "I'm sorry, but I can't.", "a@b.org", FOX])
)
ANY_ROW = st.fixed_dictionaries(
    {"instruction": WORDS, "output": st.one_of(WORDS, st.none(), st.integers())},
    optional={"input": WORDS, "document": WORDS, "origin": WORDS},
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=12))
def test_any_rows_are_kept_or_quarantined(tmp_path, rows):
    file = tmp_path / "any.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"instruction": "Q?", "output": "A."}, *rows])))
    ledger, prepared = read_and_prepare(tmp_path, file)
    kept = sum(map(len, prepared.splits.values()))
    assert kept + sum(ledger.by_reason("instruction").values()) == ledger.read["instruction"] == len(rows) + 1


WORK = """
import sys
from pathlib import Path
from llm_engineering.recipe.data_blocks import DataConfig
from llm_engineering.data import examine
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.prepare import prepare

if __name__ == "__main__":
    examine._ROWS_FOR_PROCESSES = 0
    folder, ledger = Path(sys.argv[1]), Ledger()
    loaded = load_rows(str(folder / "rows.jsonl"), "instruction", DataConfig(), folder / "rows.arrow", ledger)
    prepare(loaded.rows, "instruction", DataConfig(), ledger, folder)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="with one core no worker processes are started")
def test_worker_processes_end_when_their_parent_is_killed(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 60_000)
    (tmp_path / "work.py").write_text(WORK)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    work = psutil.Popen([sys.executable, str(tmp_path / "work.py"), str(tmp_path)], env=env)
    deadline = time.monotonic() + 120
    while not (workers := [child for child in work.children() if "spawn_main" in " ".join(child.cmdline())]):
        assert work.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    work.kill()
    work.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
