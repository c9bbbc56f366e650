"""Generation: answers are stored, asked for once, and bad questions have a reason."""

import pytest

from llm_engineering.compute.device import choose_device
from llm_engineering.config import ModelConfig
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.instructions import generate_instructions, question_problem
from llm_engineering.generation.local import AnswerStore, LocalModel
from llm_engineering.generation.preferences import generate_preferences
from llm_engineering.models import load_model, load_tokenizer

PASSAGE = "A generator function suspends its execution at each yield expression and goes on from there when asked."


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What does a generator function do at a yield expression?", ""),
        ("A generator function suspends its execution", "not_a_question"),
        ("Generators are nice, are they not?", "not_a_question"),
        ("What is x?", "question_length"),
        ("What does the passage say about a generator?", "mentions_passage"),
        ("What is the output of the following generator?", "mentions_passage"),
        ("What is the purpose of the debugger?", "not_grounded"),
    ],
)
def test_question_problems(question, reason):
    assert question_problem(question, PASSAGE) == reason


@pytest.fixture
def model(tiny_model, cpu, settings, tmp_path):
    config = ModelConfig(name_or_path=str(tiny_model), revision="test")
    loaded = load_model(config, settings, choose_device(cpu))
    tokenizer = load_tokenizer(config, settings)

    def make():
        return LocalModel(loaded, tokenizer, "tiny", AnswerStore(tmp_path / "answers.jsonl"), batch_size=2)

    return make


REQUESTS = [[{"role": "user", "content": f"Question {i}"}] for i in range(5)]


def test_stored_answers_are_not_asked_for_again(model, monkeypatch):
    answers = model().answer(REQUESTS, 4, "answers")
    asked = []
    monkeypatch.setattr(LocalModel, "_generate", lambda self, prompts, *rest: asked.append(prompts))
    assert model().answer(REQUESTS, 4, "answers") == answers
    assert asked == []


def test_drawn_answers_depend_on_the_seed_alone(model, tmp_path):
    drawn = model().answer(REQUESTS, 4, "answers", temperature=1.0, seed=1)
    (tmp_path / "answers.jsonl").unlink()
    assert model().answer(REQUESTS, 4, "answers", temperature=1.0, seed=1) == drawn
    assert model().answer(REQUESTS, 4, "answers", temperature=1.0, seed=2) != drawn
    assert model().answer(REQUESTS, 4, "answers") != drawn


def test_killed_in_the_middle_ends_with_the_same_answers(model, monkeypatch, tmp_path):
    expected = model().answer(REQUESTS, 4, "answers")
    (tmp_path / "answers.jsonl").unlink()
    real, calls = LocalModel._generate, []

    def dies(self, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(LocalModel, "_generate", dies)
    with pytest.raises(KeyboardInterrupt):
        model().answer(REQUESTS, 4, "answers")
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half-writ')
    monkeypatch.setattr(LocalModel, "_generate", real)
    again = model()
    assert len(again.store.answers) == 2
    assert again.answer(REQUESTS, 4, "answers") == expected
    assert len(model().store.answers) == 5


def passage(text=PASSAGE, title="generators"):
    return Passage(id="x", document="doc", title=title, start=0, end=len(text), text=text)


def test_rows_and_rejects_add_up(model, monkeypatch):
    questions = iter(
        [["What does a generator function do?", "Nonsense"], ["Question: What does a generator function do?"]]
    )
    monkeypatch.setattr(LocalModel, "_generate", lambda *a: next(questions))
    passages = [passage(), passage(PASSAGE + " It is lazy."), passage(PASSAGE + " It is lazy. Very.")]
    rows, rejected = generate_instructions(passages, model(), 8)
    assert [(r.prompt[0].content, r.completion[0].content) for r in rows] == [
        ("What does a generator function do?", PASSAGE)
    ]
    assert sorted(q.reason for q in rejected) == ["not_a_question", "repeated_question"]
    assert rows[0].document == "doc"
    assert rows[0].source == f"doc:characters 0-{len(PASSAGE)}"


def test_preferences_keep_what_is_not_drawn_in_the_books(model):
    rows = [
        InstructionRow(
            prompt=[Message(role="user", content=f"Q{i}")],
            completion=[Message(role="assistant", content=f"A{i}")],
            source=f"s{i}",
            origin="o",
        )
        for i in range(5)
    ]
    made, rejected = generate_preferences(rows, model(), 4, temperature=1.0, max_rows=3, seed=1)
    assert (len(made), [q.reason for q in rejected]) == (3, ["not_drawn", "not_drawn"])
    assert all(row.chosen[0].content.startswith("A") for row in made)
    assert len({row.source for row in made} | {q.source for q in rejected}) == 5
