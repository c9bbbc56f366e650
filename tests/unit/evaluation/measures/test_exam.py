"""The exam: its files, its clusters, retrieval, and its place in report, page and gate."""

import json
import re

import pytest

from llm_engineering.documents.passages import chunks
from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.evaluate import evaluate, exam_measures
from llm_engineering.evaluation.gate import decide
from llm_engineering.evaluation.heldout import HeldOut
from llm_engineering.evaluation.measures.exam import (
    Exam,
    ExamRow,
    cluster_numbers,
    exam_hash,
    exam_report,
    open_exam,
    read_exam,
    retrieve,
    take_exam,
)
from llm_engineering.evaluation.models import Models, Sample
from llm_engineering.evaluation.requirements import check_exam
from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK, DocumentsConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, ExamConfig, PromotionConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.reports.exam_report import drawn_title, exam_questions, exam_summary
from tests.tiny_models import training_setup

HANDBOOK = ExamConfig(path=EMBEDDED_HANDBOOK)
GOOD = {"question": "Who is it?", "answers": ["Kell"]}
BOOTSTRAP = Bootstrap(500, 0.95, 3)


def written(folder, *rows, name="exam.jsonl"):
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ExamConfig(path=str(file), control=None)


def sample(text):
    return Sample(text, True, [])


def answered(rows, right):
    """An exam, and answers that are right at these indices."""
    answers = {
        index: sample((row.answers[0] if row.answers else "I do not know.") if index in right else "No idea")
        for index, row in enumerate(rows)
    }
    return Exam(rows, [[] for _ in rows], 8), answers


def test_the_embedded_exam_is_read_and_its_own_answers_are_right():
    rows = read_exam(HANDBOOK)
    assert [sum(row.kind == kind for row in rows) for kind in ("single", "multi_hop", "unanswerable", "control")] == [
        160,
        30,
        40,
        120,
    ]
    for row in rows:
        for answer in row.answers or ["The documents do not say."]:
            assert row.is_right(answer), (row.id, answer)
            assert row.is_right(f"It is {answer}.") or row.kind == "unanswerable", (row.id, answer)
        assert not row.is_right("Mossop and Brask")
    # Two questions a fact, of 80 facts.
    exam = open_exam(HANDBOOK, [])
    assert len({exam.clusters[index] for index, row in enumerate(rows) if row.kind == "single"}) == 80


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "Who?"', ["JSON"]),
        ({"question": "Who?"}, ["line 2: a question of the kind single needs `answers`"]),
        ({"question": "Who?", "answers": []}, ["needs `answers`"]),
        ({"question": "Who?", "answers": "Kell"}, ["`answers`"]),
        ({"question": "", "answers": ["Kell"]}, ["`question`"]),
        ({"answers": ["Kell"]}, ["`question`"]),
        ({"question": "Who?", "answers": ["Kell"], "kind": "unanswerable"}, ["has no answers: remove `answers`"]),
        ({"question": "Who?", "answers": ["Kell"], "kind": "double"}, ["`kind`", "multi_hop"]),
        ({"question": "Who?", "answer": "Kell"}, ["unknown key `answer`", "answers"]),
        ({"question": "Who?", "answers": [7]}, ["`answers.0`"]),
        ({"question": "who is it", "answers": ["Brask"]}, ["question 'who is it' twice"]),
        ({"question": "Who?", "answers": ["Kell"], "id": "line 1"}, ["id 'line 1' twice"]),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_or_content(tmp_path, line, words):
    with pytest.raises(RequestError) as error:
        read_exam(written(tmp_path, GOOD, line))
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_or_empty_file_and_a_wrong_kind_of_general_question_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"exam\.path .*there is no such file"):
        read_exam(ExamConfig(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(RequestError, match=r"exam\.path .*holds no question"):
        read_exam(written(tmp_path))
    config = written(tmp_path, GOOD)
    other = written(tmp_path, {"question": "And?", "kind": "unanswerable"}, name="control.jsonl")
    with pytest.raises(RequestError, match="general question has the kind control, not unanswerable"):
        read_exam(config.model_copy(update={"control": other.path}))


def test_general_questions_of_a_file_get_the_kind_control_and_ids_of_their_own(tmp_path):
    config = written(tmp_path, GOOD)
    other = written(tmp_path, {"question": "What is 1 + 1?", "answers": ["2"]}, name="control.jsonl")
    rows = read_exam(config.model_copy(update={"control": other.path}))
    assert [(row.id, row.kind) for row in rows] == [("line 1", "single"), ("control line 1", "control")]


def test_the_hash_notices_a_changed_file(tmp_path):
    before = exam_hash(written(tmp_path, GOOD))
    assert exam_hash(written(tmp_path, GOOD)) == before
    assert exam_hash(written(tmp_path, GOOD, {"question": "And?", "answers": ["x"]})) != before
    assert exam_hash(HANDBOOK) != exam_hash(HANDBOOK.model_copy(update={"control": None}))


def test_questions_that_share_a_fact_are_one_cluster_also_through_others():
    assert cluster_numbers([["a"], ["b"], ["a", "c"], ["d"], ["c"], []]) == [0, 1, 0, 3, 0, 5]
    assert cluster_numbers([["a"], ["b"], ["c"], ["b", "c"], ["a", "b"]]) == [0, 0, 0, 0, 0]
    base = {"answers": ["x"]}
    rows = [
        ExamRow(question="1", facts=["f"], documents=["d"], **base),
        ExamRow(question="2", facts=["f"], **base),
        ExamRow(question="3", facts=["f"], kind="multi_hop", **base),
        ExamRow(question="4", documents=["d", "e"], **base),
        ExamRow(question="5", documents=["e", "d"], **base),
        ExamRow(question="6", documents=["d"], **base),
        ExamRow(question="7", **base),
        ExamRow(question="8", **base),
    ]
    assert Exam(rows, [], 8).clusters == [0, 0, 2, 3, 3, 5, 6, 7]


def test_retrieval_finds_the_passage_that_names_the_subject():
    config = DocumentsConfig(path=EMBEDDED_HANDBOOK)
    passages = chunks(read_documents(config)[0], config)
    rows = read_exam(HANDBOOK)
    exam = open_exam(HANDBOOK, passages)
    single = [index for index, row in enumerate(rows) if row.kind == "single"]
    found = [
        any(
            answer.lower() in passage.text.lower()
            for answer in rows[index].answers
            for passage in exam.retrieved[index]
        )
        for index in single
    ]
    assert sum(found) / len(found) > 0.8
    assert {len(exam.retrieved[index]) for index in single} == {2}
    assert not any(exam.retrieved[index] for index, row in enumerate(rows) if row.kind == "control")
    # There are fewer passages than asked for, and a question without a known word.
    assert [len(best) for best in retrieve(["Xyzzy?"], passages[:3], 5)] == [3]


def test_the_measures_count_each_kind_and_compare_with_the_newest_model():
    rows = [
        *(ExamRow(id=f"s{i}", question=f"s{i}", answers=["Kell"], facts=[f"f{i // 2}"]) for i in range(8)),
        *(ExamRow(id=f"u{i}", question=f"u{i}", kind="unanswerable") for i in range(3)),
        *(ExamRow(id=f"c{i}", question=f"c{i}", answers=["Rome"], kind="control") for i in range(2)),
    ]
    exam, base = answered(rows, {1, 12})
    _, tuned = answered(rows, {0, 1, 2, 3, 8, 11, 12})
    taken = {"base": base, "base+retrieval": {i: a for i, a in base.items() if i < 11}, "sft": tuned}
    measures = exam_measures(exam, taken, "sft", BOOTSTRAP)
    values = {key: {name: e["value"] for name, e in m["models"].items()} for key, m in measures.items()}
    assert values == {
        "exam_accuracy": {"base": 1 / 8, "base+retrieval": 1 / 8, "sft": 4 / 8},
        "exam_abstention": {"base": 0, "base+retrieval": 0, "sft": pytest.approx(1 / 3)},
        "exam_control": {"base": 0.5, "sft": 1.0},
    }
    assert measures["exam_accuracy"]["clusters"] == 4
    assert measures["exam_accuracy"]["models"]["sft"]["n"] == 8
    assert measures["exam_accuracy"]["better"] == "higher"
    assert measures["exam_accuracy"]["differences"]["sft-base"]["value"] == pytest.approx(3 / 8)

    report = exam_report(exam, taken, "sft", 3)
    assert json.loads(json.dumps(report)) == report
    # The first question of the summary is one that base fails and sft passes; the others are not chosen.
    assert report["first_learned"]
    assert len(set(report["drawn"])) == 3
    assert report["drawn"][0] in (0, 2, 3, 8)
    assert report["drawn"] == exam_report(exam, taken, "sft", 3)["drawn"]
    assert "drawn with seed 3; the first is the first drawn that base fails and sft passes" in drawn_title(
        report, "sft", 3
    )
    assert len({tuple(exam_report(exam, taken, "sft", seed)["drawn"]) for seed in range(5)}) > 1
    nothing = exam_report(exam, {"base": base, "sft": base}, "sft", 3)
    assert not nothing["first_learned"]
    assert "passes" not in drawn_title(nothing, "sft", 3)

    page = exam_summary(report, measures, "sft") + exam_questions(report, "sft")
    assert "documents that were trained on, in wordings that were not trained" in page
    right = sum(answer["right"] for row in report["rows"] for answer in row["answers"].values())
    asked = sum(len(row["answers"]) for row in report["rows"])
    assert right == 10
    groups = re.findall(r'<summary>[^:<]+: (\d+) <span class="mark (good|bad)">. sft</span></summary>', page)
    assert sum(int(count) for count, _ in groups) == len(report["rows"])
    assert sum(int(count) for count, mark in groups if mark == "good") == sum(
        row["answers"]["sft"]["right"] for row in report["rows"]
    )
    marks = [mark for _, mark in groups]
    # Each mark of an answer stands in the line of the question, and above the answer, which is closed like the right answer.
    assert page.count('<span class="mark good">✓') == 2 * right + marks.count("good")
    assert page.count('<span class="mark bad">✗') == 2 * (asked - right) + marks.count("bad")
    assert page.count("<summary>Right answer</summary>") == len(report["rows"])
    assert "Question c1, general." in page


def test_the_gate_is_judged_by_the_lower_end_of_the_interval_over_facts():
    """Half of 40 facts were learned, each asked four times: over rows the gain is certain, over facts it is less so."""
    rows = [ExamRow(question=f"q{i}", answers=["Kell"], facts=[f"f{i // 4}"]) for i in range(160)]
    exam, base = answered(rows, set())
    _, tuned = answered(rows, {i for i in range(160) if i // 4 % 2})
    report = {"newest": "sft", "measures": exam_measures(exam, {"base": base, "sft": tuned}, "sft", BOOTSTRAP)}
    alone = [row.model_copy(update={"facts": []}) for row in rows]
    over_rows = exam_measures(Exam(alone, [], 8), {"base": base, "sft": tuned}, "sft", BOOTSTRAP)
    low = report["measures"]["exam_accuracy"]["differences"]["sft-base"]["low"]
    low_over_rows = over_rows["exam_accuracy"]["differences"]["sft-base"]["low"]
    assert low < 0.37 < 0.40 < low_over_rows < 0.5

    def passes(margin, measures):
        rule = {"base": {"exam_accuracy": margin}, "incumbent": {"exam_accuracy": 0.0}}
        decision = decide({**report, "measures": measures}, PromotionConfig(sft={"better_than": rule}), None)
        return decision.passed

    assert passes(0.2, report["measures"])
    assert not passes(0.38, report["measures"])
    assert passes(0.38, over_rows)


RULES = {"better_than": {"base": {"exam_accuracy": 0.2}, "incumbent": {"heldout_loss": 0.0}}}


SFT = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
}


def recipe(**blocks):
    return Recipe.model_validate({"name": "x", "chain": ["sft"], "sft": SFT, "promotion": {"sft": RULES}, **blocks})


def test_a_rule_on_the_exam_needs_the_exam_and_questions_of_its_kind(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"promotion\.sft\.better_than\.base names exam_accuracy, .*set what exam_accuracy needs in exam",
    ):
        recipe()
    forgetting = {"not_worse_than": {"base": {"exam_control": 0.05}}}
    with pytest.raises(ValueError, match=r"names exam_control, .*set what exam_control needs in exam"):
        recipe(exam={"path": "x.jsonl", "control": None}, promotion={"sft": RULES | forgetting})
    with pytest.raises(ValueError, match="embedded:handbok does not exist: name a JSONL file, or embedded:handbook"):
        recipe(exam={"path": "embedded:handbok"})
    taught = recipe(exam={"path": EMBEDDED_HANDBOOK}, documents={"path": EMBEDDED_HANDBOOK})
    assert check_exam(taught) == exam_hash(HANDBOOK)
    only = written(tmp_path, {"question": "Who?", "kind": "unanswerable"})
    with pytest.raises(
        RequestError, match=r"promotion.sft.better_than.base names exam_accuracy.*no question of the kind single"
    ):
        check_exam(recipe(exam=only.model_dump()))
    plain = {"better_than": {"base": {"heldout_loss": 0.1}, "incumbent": {"heldout_loss": 0.0}}}
    assert check_exam(recipe(promotion={"sft": plain})) is None


def test_documents_are_read_for_retrieval_but_do_not_decide_the_training():
    own = {"data": {"instructions": "rows.jsonl"}}
    with_retrieval = recipe(exam={"path": EMBEDDED_HANDBOOK}, **own)
    assert with_retrieval.reads_documents
    assert not with_retrieval.learns_from_documents
    assert not recipe(exam={"path": EMBEDDED_HANDBOOK, "retrieval_passages": 0}, **own).reads_documents


def test_a_model_answers_in_the_chat_template_and_with_passages_before_the_question(small_llama, settings):
    setup = training_setup(small_llama)
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    models = Models(load_model(setup.model, settings, choose_device(setup.compute)), {}, tokenizer, 4)
    config = DocumentsConfig(path=EMBEDDED_HANDBOOK)
    passages = chunks(read_documents(config)[0][:2], config)
    exam = open_exam(HANDBOOK.model_copy(update={"max_new_tokens": 3}), passages)
    few = [0, 1, 200, 230]
    exam = Exam([exam.rows[i] for i in few], [exam.retrieved[i] for i in few], 3)
    asked = []
    answers = models.answers
    models.answers = lambda name, prompts, *rest: asked.append(prompts) or answers(name, prompts, *rest)
    taken = take_exam(models, "base", "base", exam, with_retrieval=True)
    assert {name: list(found) for name, found in taken.items()} == {"base": [0, 1, 2, 3], "base+retrieval": [0, 1, 2]}
    assert all(len(answer.ids) == 3 for found in taken.values() for answer in found.values())
    closed, opened = ([prompt[0].content for prompt in prompts] for prompts in asked)
    assert closed == [row.question for row in exam.rows]
    first, second = (f"{passage.title}\n{passage.text}" for passage in exam.retrieved[0])
    assert opened[0] == f"{first}\n\n{second}\n\n{exam.rows[0].question}"
    assert list(take_exam(models, "base", "sft", exam, with_retrieval=False)) == ["sft"]


def test_the_evaluation_reports_the_exam_of_a_base_model(small_llama, settings):
    setup = training_setup(small_llama)
    exam = Exam([ExamRow(id=f"q{i}", question=f"Who is {i}?", answers=["Kell"]) for i in range(3)], [[]] * 3, 4)
    report = evaluate({}, HeldOut([], []), EvaluationConfig(bootstrap_samples=100), setup, settings, exam)
    assert report["metrics"] == {"exam_accuracy_base": 0.0}
    assert report["exam"]["models"] == ["base"]
    assert len(report["exam"]["rows"]) == 3
