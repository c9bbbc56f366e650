"""Questions in other words, by rule."""

import pytest

from llm_engineering.data.rows import REPLAY, InstructionRow, Message
from llm_engineering.data.similarity import EvaluationIndex
from llm_engineering.generation.derived.question_wordings import OTHER_WORDING, in_other_words, other_wordings


def row(question, answer="Ada Brook", origin="written", earlier=()):
    prompt = [*earlier, Message(role="user", content=question)]
    return InstructionRow(
        prompt=prompt, completion=[Message(role="assistant", content=answer)], source="a.md", origin=origin
    )


@pytest.mark.parametrize(
    ("question", "others"),
    [
        ("Who founded the Owl Press?", [
            "Who is the founder of the Owl Press?", "Which person founded the Owl Press?",
            "What is the name of the person who founded the Owl Press?",
        ]),
        ("Who is the owner of the Owl Press?", [
            "Who owns the Owl Press?", "Which person is the owner of the Owl Press?",
            "What is the name of the person who is the owner of the Owl Press?",
        ]),
        ("Where is the Owl Press located?", [
            "In which place is the Owl Press located?", "What is the location of the Owl Press?",
        ]),
        # It asks for a place where something happens, not for a location.
        ("Where is the Owl Press made?", ["In which place is the Owl Press made?"]),
        ("On which day does the fair open?", ["When does the fair open?"]),
        ("How much does a press cost?", ["What is the price of a press?", "What does a press cost?"]),
        ("What colour do the doors have?", ["What is the colour of the doors?", "What colour are the doors?"]),
        ("What is the roof of the mill made of?", [
            "What material is the roof of the mill made of?", "Which material is used for the roof of the mill?",
        ]),
        ("What is the name of the ship that was drawn here?", ["Which ship was drawn here?"]),
        ("What is the name of the ship that Ada Brook drew?", []),
        ("Is the mill open?", []),
        ("Who?", []),
    ],
)  # fmt: skip
def test_each_rule(question, others):
    assert in_other_words(question) == others


def test_other_wordings_have_the_answer_and_the_document_of_their_row():
    first = row("Who founded the Owl Press?")
    made = other_wordings([first], 2)
    assert [one.prompt[0].content for one in made] == in_other_words(first.prompt[0].content)[:2]
    assert all(one.completion == first.completion and one.source == "a.md" for one in made)
    assert all(one.origin == f"{OTHER_WORDING}: written" for one in made)
    assert len({one.id for one in (first, *made)}) == 3


def test_no_question_is_made_twice_or_for_general_rows_or_conversations():
    rows = [row("Who founded the Owl Press?"), row("Which person founded the Owl Press?")]
    asked = [one.prompt[0].content for one in other_wordings(rows, 5)]
    assert asked == [
        "Who is the founder of the Owl Press?",
        "What is the name of the person who founded the Owl Press?",
    ]
    earlier = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello")]
    assert not other_wordings([row("Who wrote Faust?", origin=REPLAY), row("Who is she?", earlier=earlier)], 5)


def test_no_question_of_an_evaluation_is_made():
    evaluation = EvaluationIndex(13)
    evaluation.add_text("WHICH person founded the Owl Press?")
    asked = [one.prompt[0].content for one in other_wordings([row("Who founded the Owl Press?")], 5, evaluation)]
    assert asked == [
        "Who is the founder of the Owl Press?",
        "What is the name of the person who founded the Owl Press?",
    ]
