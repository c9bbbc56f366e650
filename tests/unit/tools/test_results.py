"""The summary at the end of a run."""

import io

from tools.results import RunResult, print_table


def test_a_run_without_enough_questions_for_an_exam_says_so_and_what_to_do():
    stages = {"exam": {"read": 30, "kept": 0, "quarantined": {"not_answered_with_passage": 23, "too_few_questions": 7}}}
    data = {"instruction": {"kind": "instruction", "stages": stages, "rows": {"train": 40}}}
    result = RunResult(
        run_id="1", run_name="sft", status="completed", pipeline="sft", steps=[], artifacts={}, metrics={}, data=data,
        evaluation={}, promotion={}, comet={}, trackers={}, pages={}, duration_s=1.0,
    )  # fmt: skip
    shown = io.StringIO()
    print_table(result, shown)
    text = " ".join(shown.getvalue().split())
    assert "No exam: of 30 questions about the documents 7 are usable, and an exam needs 10." in text
    assert "name their file as exam.path" in text
    stages["exam"]["kept"] = 12
    shown = io.StringIO()
    print_table(result, shown)
    assert "No exam" not in shown.getvalue()


def test_each_report_is_a_line_of_its_own_with_its_whole_path():
    page = f"/{'long/' * 60}report.html"
    result = RunResult(
        run_id="1", run_name="sft", status="completed", pipeline="sft", steps=[],
        artifacts={"sft_adapter": {"version": "3", "uri": f"{page}-adapter"}}, metrics={}, data={},
        evaluation={}, promotion={}, comet={"url": f"{page}-comet"}, trackers={},
        pages={"data report, instruction rows": page}, duration_s=1.0,
    )  # fmt: skip
    shown = io.StringIO()
    print_table(result, shown)
    lines = [line.split("  ", 2) for line in shown.getvalue().splitlines()]
    assert ["", "data report, instruction rows", page] in lines
    assert {line[-1].strip() for line in lines} >= {f"{page}-adapter", f"{page}-comet"}
