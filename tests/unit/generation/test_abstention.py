"""Questions that the documents do not answer, and the pairs made of them."""

import math
from collections import Counter

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import REPLAY, InstructionRow, Message, normalised
from llm_engineering.generation.abstention import ABSTENTION, generate_abstentions, unanswerable
from llm_engineering.generation.prompts import read_prompt
from llm_engineering.generation.types import Answer, Failure
from llm_engineering.recipe.generation_blocks import PreferenceWriting

TEXTS = [
    "The Kelp Lamp was designed by Alice Corven.",
    "A Kelp Lamp costs 40 crowns.",
    "The Heron Pump is painted orange.",
    "The Heron Pump was designed in a barn.",
]


def row(question, answer):
    return InstructionRow(
        prompt=[Message(role="user", content=question)],
        completion=[Message(role="assistant", content=answer)],
        source="doc.md:characters 0-9",
        origin="fact",
        document="doc.md",
    )


ROWS = [
    row("Who designed the Kelp Lamp?", "Alice Corven"),
    row("How much does the Kelp Lamp cost?", "40 crowns"),
    row("What colour is the Heron Pump?", "orange"),
    row("Where was the Heron Pump designed?", "barn"),
]


@pytest.fixture
def questions():
    return unanswerable(ROWS, TEXTS, 20, seed=1)


def test_a_written_question_gets_another_name_unless_a_document_answers_it(questions):
    assert "How much does the Heron Pump cost?" in questions
    assert "What colour is the Kelp Lamp?" in questions
    # A sentence has the Heron Pump and "designed"
    assert "Who designed the Heron Pump?" not in questions


def test_common_questions_fill_the_rest_and_none_is_asked_twice(questions):
    common = [question for question in questions if question not in {"How much does the Heron Pump cost?"}]
    assert len(questions) == 20
    assert len({normalised(question) for question in questions}) == 20
    assert any("insures" in question or "motto" in question or "owns" in question for question in common)
    assert not {normalised(one.prompt[0].content) for one in ROWS} & {normalised(question) for question in questions}


def test_most_are_written_questions_with_another_name():
    mills = [row(f"{words} the mill of Corvin{i}?", "Odo") for i in range(20) for words in ("Who keeps", "Who owns")]
    lamps = [row(f"{words} the lamp of Bela{i}?", "oil") for i in range(20) for words in ("What burns in", "What lit")]
    made = unanswerable([*mills, *lamps], [], 40, seed=1)
    renamed = [question for question in made if " the mill of Bela" in question or " the lamp of Corvin" in question]
    assert len(made) == 40
    assert len(renamed) == 30


def test_no_question_is_made_that_any_sentence_about_the_name_may_answer():
    rows = [
        row(f"{words} Corvin{i}?", "Odo") for i in range(9) for words in ("Where is", "What comes from", "Who owns")
    ]
    made = unanswerable(rows, [], 40, seed=1)
    assert not [one for one in made if one.startswith(("Where is Corvin", "What comes from"))]


def test_questions_of_an_exam_are_not_made(questions):
    others = unanswerable(ROWS, TEXTS, 20, seed=1, exclude=[question.upper() for question in questions])
    assert others
    assert not set(questions) & set(others)


def test_the_seed_decides_and_documents_without_names_give_none(questions):
    assert unanswerable(ROWS, TEXTS, 20, seed=1) == questions
    assert unanswerable(ROWS, TEXTS, 20, seed=2) != questions
    assert unanswerable([row("what is it?", "a lamp")], TEXTS, 20, seed=1) == []


def test_every_common_question_names_something():
    assert all("{name}" in line and line.endswith("?") for line in read_prompt("unanswerable").splitlines())


class Scripted:
    """Answers each question from a table, and every other question with 7 crowns."""

    identity = "scripted"

    def __init__(self, **answers):
        self.answers = answers

    def answer(self, requests, sampling, what):
        asked = [messages[0]["content"] for messages in requests]
        return [self.answers.get(question, Answer("7 crowns")) for question in asked]


def test_pairs_prefer_right_answers_to_wrong_ones_and_declining_to_made_up_ones():
    client = Scripted(
        **{
            "Who designed the Kelp Lamp?": Answer("It was Alice Corven."),
            "What colour is the Heron Pump?": Answer("Red"),
            "How much does the Kelp Lamp cost?": Answer(" "),
            "Where was the Heron Pump designed?": Failure("refused", "no"),
        }
    )
    pairs, rejected, read = generate_abstentions(ROWS, TEXTS, client, PreferenceWriting(unanswerable=6), seed=1)
    written = {p.prompt[0].content: (p.chosen[0].content, p.rejected[0].content) for p in pairs if p.document}
    # No other question begins with "Who", so the rejected answer is to decline
    assert written == {
        "Who designed the Kelp Lamp?": ("Alice Corven", ABSTENTION),
        "What colour is the Heron Pump?": ("orange", "Red"),
    }
    made = [(p.chosen[0].content, p.rejected[0].content) for p in pairs if not p.document]
    # At most half as many as there are rows
    assert made == [(ABSTENTION, "7 crowns")] * 2
    assert [q.reason for q in rejected] == ["no_rejected_answer"] * 2
    Ledger().record("preference", read, len(pairs), rejected)


def test_a_right_model_learns_not_to_decline_from_few_rows_and_from_general_ones():
    """If each right answer were preferred to declining, no question would be declined."""
    rows = [row(f"Who keeps mill {i} of Corvin?", f"Keeper {i}") for i in range(100)]
    general = [row(f"What is {i} and {i}?", f"Sum {i}").model_copy(update={"origin": REPLAY}) for i in range(10)]
    right = {one.prompt[0].content: Answer(one.completion[0].content) for one in (*rows, *general)}
    pairs, _, _ = generate_abstentions([*rows, *general], [], Scripted(**right), PreferenceWriting(), seed=1)
    rejected = {p.prompt[0].content: p.rejected[0].content for p in pairs}
    assert len(rejected) == 110
    assert {rejected[one.prompt[0].content] for one in general} == {ABSTENTION}
    declining = [one for one in rows if rejected[one.prompt[0].content] == ABSTENTION]
    assert 5 <= len(declining) <= 30
    others = {one.completion[0].content for one in rows}
    for one in rows:
        wrong = rejected[one.prompt[0].content]
        assert wrong == ABSTENTION or wrong in others - {one.completion[0].content}


def test_no_own_answer_to_a_general_question_is_rejected():
    """A right one may have other words than the row: India, and "The Taj Mahal is in India."."""
    general = [
        row("In which country is the Taj Mahal?", "The Taj Mahal is in India.").model_copy(update={"origin": REPLAY}),
        row("How many toes are on one foot?", "Five").model_copy(update={"origin": REPLAY}),
    ]
    own = {"In which country is the Taj Mahal?": Answer("India"), "How many toes are on one foot?": Answer("Twelve")}
    pairs, _, _ = generate_abstentions([*ROWS, *general], TEXTS, Scripted(**own), PreferenceWriting(), seed=1)
    rejected = {p.prompt[0].content: p.rejected[0].content for p in pairs}
    assert [rejected[question] for question in own] == [ABSTENTION, ABSTENTION]


def test_a_model_that_declines_already_gives_no_pair():
    class Declines(Scripted):
        def answer(self, requests, sampling, what):
            return [Answer("The documents do not say.")] * len(requests)

    pairs, rejected, _ = generate_abstentions(ROWS, TEXTS, Declines(), PreferenceWriting(unanswerable=4), seed=1)
    assert {p.rejected[0].content for p in pairs} == {ABSTENTION}
    assert len(pairs) == len(ROWS)
    assert len(rejected) == 2


def test_many_pairs_ask_in_wordings_that_the_model_has_not_read():
    """A model that is asked only in wordings that it knows learns to decline all others."""
    reworded = [row(f"Which person is keeper of mill {i} of Corvin?", f"Keeper {i}") for i in range(60)]
    rows = [row(f"Who keeps mill {i} of Corvin?", f"Keeper {i}") for i in range(100)]
    general = [row(f"What is {i} and {i}?", f"Sum {i}").model_copy(update={"origin": REPLAY}) for i in range(50)]
    writing = PreferenceWriting(unanswerable=500)
    pairs, _, read = generate_abstentions(
        [*rows, *general], [], Scripted(), writing, 1, [*reworded, rows[0]], [reworded[0].prompt[0].content]
    )
    asked = Counter(
        "new" if p.prompt[0].content.startswith("Which person") else p.chosen[0].content.split()[0] for p in pairs
    )
    # One is a question of an exam. Rules ask each in other words: "Who is keeper of mill 1 of Corvin?", and "Which person
    # keeps mill 0 of Corvin?" for the row that was read before.
    assert asked["new"] == 59 + 1
    assert asked["Keeper"] == 160
    assert 3 <= asked["Sum"] <= 20
    known = asked["new"] + asked["Keeper"] + asked["Sum"]
    assert 0 < asked["The"] <= math.ceil(known / 2)
    assert read == len(pairs)
