"""What the exam section says about training: its tokens, beside the share of right answers."""

from llm_engineering.reports.exam_report import exam_summary


def test_the_exam_section_shows_accuracy_against_tokens():
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    measure = {"clusters": 4, "better": "higher", "models": {"base": estimate, "sft": estimate}}
    measure["differences"] = {"sft-base": {**estimate, "n": 4, "verdict": "better"}}
    exam = {"models": ["base", "sft"], "retrieval_passages": 0, "kinds": {"single": 5}}
    page = exam_summary(exam, {"exam_accuracy": measure}, "sft", {"cpt": 25_000, "sft": 55_000})
    assert (
        "Training read 25,000 tokens about the documents in cpt and 55,000 in sft, 80,000 in all, and sft answers 50%"
        in page
    )
    assert "Training" not in exam_summary(exam, {"exam_accuracy": measure}, "sft")
