"""The verdict of the data report: which data is fit to train on, and what happens to other data."""

import re

import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.reasons import REASONS
from llm_engineering.data.rows import AT_LAST_SENTENCE, REPLAY, InstructionRow, Message, PreferenceRow, Quarantined
from llm_engineering.errors import RequestError
from llm_engineering.formatting.datasets import FormattedRow, Lengths
from llm_engineering.reports.data_report import refuse_unfit_data, write_data_report


def aside(count, reason):
    return aside_of("instruction", count, reason)


def aside_of(stage, count, reason):
    return [Quarantined(stage=stage, reason=reason, source="s", place=str(i)) for i in range(count)]


def instruction(number, origin="o", document=""):
    return InstructionRow(
        prompt=[Message(role="user", content=f"What is {number}?")],
        completion=[Message(role="assistant", content="It is this.")],
        source="s",
        origin=origin,
        document=document,
    )


def reported(folder, ledger, rows, held_out=()):
    """The report about formatted rows of three tokens: of the training split, and as pairs of a split and a row."""
    lengths = Lengths()
    for split, row in [*(("train", row) for row in rows), *held_out]:
        ids = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2]}
        record = ids if isinstance(row, PreferenceRow) else {"input_ids": [1, 2, 3]}
        lengths.add(split, FormattedRow(row, [record], 3, None))
    columns = {
        "findings": ("id", "source", "rule", "detail"),
        "clusters": ("cluster", "source", "split", "fate"),
        "suspicious": ("id", "source", "findings", "prompt", "answer"),
    }
    tables = DatasetDict({name: Dataset.from_dict({key: [] for key in keys}) for name, keys in columns.items()})
    return write_data_report(folder, next(iter(ledger.read)), ledger, tables, lengths, 64)


@pytest.mark.parametrize(
    ("kept", "drafts", "dropped", "repeated", "why"),
    [
        (20, 0, 0, 0, ""),
        (19, 0, 0, 0, "only 19 rows are left, and at least 20 are needed to train and to hold some out"),
        (
            6,
            20,
            1,
            0,
            "only 6 rows are left, and at least 20 are needed to train and to hold some out "
            "(set aside: not_grounded 20, refusal 1)",
        ),
        # A writer that needs five questions for each good one damages no data.
        (30, 150, 10, 0, ""),
        (30, 0, 30, 0, ""),
        (30, 0, 31, 0, "more than half of the 61 rows were set aside (refusal 31)"),
        (30, 200, 31, 0, "more than half of the 61 rows were set aside (not_grounded 200, refusal 31)"),
        (30, 0, 0, 90, ""),
    ],
)
def test_data_is_fit_with_enough_rows_and_few_that_the_checks_set_aside(kept, drafts, dropped, repeated, why, tmp_path):
    ledger = Ledger()
    written = kept + dropped + repeated
    ledger.record("instruction", written + drafts, written, aside(drafts, "not_grounded"), writes=True)
    # The step that checks the rows reads the ledger of the step that wrote them.
    ledger = Ledger.load(ledger.datasets())
    ledger.record("instruction", written, kept, aside(dropped, "refusal") + aside(repeated, "near_duplicate"))
    report = reported(tmp_path, ledger, map(instruction, range(kept)))
    assert (report["fit_to_train"], report["why"]) == (not why, why)


def test_rows_of_a_general_dataset_do_not_make_data_fit(tmp_path):
    ledger = Ledger()
    ledger.record("instruction", 154, 154)
    rows = [*map(instruction, range(4)), *(instruction(i, REPLAY) for i in range(150))]
    report = reported(tmp_path, ledger, rows)
    assert report["why"].startswith("only 4 rows are left")


def test_data_that_is_not_fit_is_refused_and_its_report_is_kept(tmp_path):
    ledger = Ledger()
    ledger.record("instruction", 9, 3, aside(6, "not_grounded"), writes=True)
    ledger.record("document", 15, 15)
    ledger.record("passage", 27, 9, [q.model_copy(update={"stage": "passage"}) for q in aside(18, "too_short")])
    report = reported(tmp_path / "report", ledger, map(instruction, range(3)))
    with pytest.raises(RequestError) as error:
        refuse_unfit_data(report, tmp_path / "report", tmp_path / "kept")
    assert str(error.value) == (
        "The instruction rows are not fit to train on: only 3 rows are left, and at least 20 are needed to train and to hold "
        "some out (set aside: not_grounded 6); 15 documents read, 15 kept; 27 passages read, 9 kept. Nothing was trained "
        f"with them. {tmp_path}/kept/report.html shows what was set aside. Add documents or rows, or set data.train_unfit to "
        "true to train anyway: the model version is then marked with unfit_data."
    )
    assert (tmp_path / "kept" / "report.html").read_text() == (tmp_path / "report" / "report.html").read_text()
    refuse_unfit_data(report | {"why": ""}, tmp_path / "report", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_page_shows_at_once_whether_data_is_fit_and_what_became_of_the_rows(tmp_path):
    ledger = Ledger()
    ledger.record("preference", 90, 60, aside_of("preference", 30, "not_verbatim"), writes=True)
    ledger.record("preference", 60, 40, aside_of("preference", 20, "near_duplicate"))
    rows = [
        PreferenceRow(
            prompt=[Message(role="user", content=f"What is {i}?")],
            chosen=[Message(role="assistant", content=f"The good one, {i}.")],
            rejected=[Message(role="assistant", content=f"The bad one, {i}.")],
            source="s",
            origin="o",
        )
        for i in range(40)
    ]
    report = reported(tmp_path, ledger, rows[:30], [("test", row) for row in rows[30:]])
    page = (tmp_path / "report.html").read_text()
    assert (report["drafts"], '<header class="strip good">' in page, "Fit to train on" in page) == (30, True, True)
    bars = re.findall(r'<div>([\w ]+)</div><div class="n">(\d+)</div><div class="bar">', page)
    assert bars == [
        ("read or written", "90"),
        ("usable", "60"),
        ("kept", "40"),
        ("for train", "30"),
        ("for test", "10"),
    ]
    # The chosen answer stands above the rejected one.
    assert (
        page.index("Chosen") < page.index("The good one, 0.") < page.index("Rejected") < page.index("The bad one, 0.")
    )
    for reason in ("not_verbatim", "near_duplicate"):
        assert f"<td>{reason}</td>" in page
        assert REASONS[reason] in page
    # Sections without anything to show are left out.
    assert "Leaks and contamination" not in page
    assert "Duplicates" not in page

    ledger = Ledger()
    ledger.record("instruction", 3, 3)
    reported(tmp_path, ledger, map(instruction, range(3)))
    page = (tmp_path / "report.html").read_text()
    assert '<header class="strip bad">' in page
    assert "The rows are not fit to train on: only 3 rows are left" in page


def test_answers_that_end_at_their_last_sentence_are_counted(tmp_path):
    ledger = Ledger()
    ledger.record("preference", 30, 30)
    message = [Message(role="user", content="What?")]
    rows = [
        PreferenceRow(
            prompt=message,
            chosen=[Message(role="assistant", content="This.")],
            rejected=[Message(role="assistant", content=f"{i}.")],
            source="s",
            origin=f"chosen: o; rejected by m, {AT_LAST_SENTENCE}" if i < 7 else "chosen: o; rejected by m",
        )
        for i in range(30)
    ]
    report = reported(tmp_path, ledger, rows)
    assert report["ended_at_last_sentence"] == 7
    assert any("7 rejected answers reached their limit of tokens" in line for line in report["guidance"])


def test_a_document_with_more_than_a_quarter_of_a_held_out_split_is_named(tmp_path):
    ledger = Ledger()
    ledger.record("instruction", 68, 48, aside(20, "document_over_quarter"))
    held_out = [("validation", "a.md"), ("validation", "a.md"), *[("test", "b.md")] * 3, *[("test", "c.md")] * 2]
    held_out += [("test", ""), ("test", "d.md"), ("test", "e.md")]
    found = [(split, instruction(number, document=document)) for number, (split, document) in enumerate(held_out)]
    report = reported(tmp_path, ledger, map(instruction, range(38)), found)
    # A row without a document is one of the split's rows, and none of its documents.
    assert report["held_out"] == {
        "validation": {"rows": 2, "documents": 1, "largest": "a.md", "largest_rows": 2, "largest_share": 1.0},
        "test": {"rows": 8, "documents": 4, "largest": "b.md", "largest_rows": 3, "largest_share": 0.375},
    }
    named = [line for line in report["guidance"] if "depend on this document" in line]
    assert named == [
        "a.md has 2 of the 2 validation rows (100%; 1 document in this split), so the results depend on this document more "
        "than on others. Add documents, or raise data.split.validation_fraction.",
        "b.md has 3 of the 8 test rows (38%; 4 documents in this split), so the results depend on this document more "
        "than on others. Add documents, or raise data.split.test_fraction.",
    ]
    assert "Document with most rows" in (tmp_path / "report.html").read_text()
    # One row fewer is a quarter.
    del found[2]
    found.append(("test", instruction(99, document="f.md")))
    report = reported(tmp_path, ledger, map(instruction, range(38)), found)
    assert report["held_out"]["test"]["largest_share"] == 0.25
    assert not any("test rows (25%" in line for line in report["guidance"])


def test_good_rows_that_a_held_out_split_has_no_place_for_do_not_make_data_unfit(tmp_path):
    ledger = Ledger()
    ledger.record("instruction", 100, 40, aside(60, "document_over_quarter"))
    assert reported(tmp_path, ledger, map(instruction, range(40)))["fit_to_train"]
