"""What the exam section says about training: its tokens, and the questions for each fact."""

from llm_engineering.data.rows import REPLAY, InstructionRow, Message
from llm_engineering.reports.exam_report import exam_summary
from llm_engineering.reports.training_rows import count_wordings


def row(question, answer, document, origin="fact by a model"):
    return InstructionRow(
        prompt=[Message(role="user", content=question)],
        completion=[Message(role="assistant", content=answer)],
        source=document,
        origin=origin,
        document=document,
    )


ROWS = [
    row("Who edits it?", "Robin Kell", "handbook/plank.md"),
    row("Who edits it", "Robin Kell", "handbook/plank.md"),
    row("Which person edits it?", "Robin Kell", "handbook/staff.md"),
    row("Who wrote it?", "Robin Kell", "handbook/other.md"),
    row("Who edits the paper of Ondrel?", "Robin Kell", "handbook/plank.md", "two_hop by rule"),
    row("Who?", "Robin Kell", "handbook/plank.md", REPLAY),
]
FACT = {"kind": "single", "documents": ["plank.md", "staff.md"], "accepted": ["Robin Kell", "Kell"]}


def test_the_questions_for_a_fact_have_its_answer_and_its_documents():
    exam = [
        FACT,
        {**FACT, "accepted": ["Irene Marrop"]},
        {**FACT, "documents": []},
        {**FACT, "kind": "multi_hop"},
    ]
    assert count_wordings(exam, ROWS) == [2, 0, None, None]
    # A user's own questions name no document.
    own = [row("Who edits it?", "Robin Kell", "")]
    assert count_wordings(exam, own) == count_wordings(exam, []) == [None] * 4


def test_the_exam_section_shows_accuracy_against_tokens_and_questions():
    rows = [
        {"wordings": n, "answers": {"sft": {"right": right}}}
        for n, right in ((0, 0), (2, 1), (3, 0), (9, 1), (None, 1))
    ]
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    measure = {"clusters": 4, "better": "higher", "models": {"base": estimate, "sft": estimate}}
    measure["differences"] = {"sft-base": {**estimate, "n": 4, "verdict": "better"}}
    exam = {"models": ["base", "sft"], "retrieval_passages": 0, "kinds": {"single": 5}, "rows": rows}
    page = exam_summary(exam, {"exam_accuracy": measure}, "sft", {"cpt": 25_000, "sft": 55_000})
    assert (
        "Training read 25,000 tokens about the documents in cpt and 55,000 in sft, 80,000 in all, and sft answers 50%"
        in page
    )
    for cells in (("0", "1", "0 (0%)"), ("2 to 3", "2", "1 (50%)"), ("4 or more", "1", "1 (100%)")):
        assert all(f">{cell}<" in page for cell in cells), cells
    assert "1 (100%)" in page
    without = exam_summary({**exam, "rows": [{"answers": {}}]}, {"exam_accuracy": measure}, "sft")
    assert "Training" not in without
