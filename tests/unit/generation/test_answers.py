"""The words of a sentence that a question can ask for."""

import pytest

from llm_engineering.generation.answers import choose_answers

# Other sentences of the same documents: they show that these words are names, places, or plain words.
AROUND = [
    "A mill stands in Corvin.",
    "The lamp of the Kelp Lamp glows.",
    "Nobody rows at night.",
    "We walked home in the rain.",
    "The fair was loud.",
    "Bread is cheap.",
    "It rained.",
]


@pytest.mark.parametrize(
    ("sentence", "answer", "kind", "topic"),
    [
        ("Rosa Fannow cooks for the Kelp Lamp.", "Rosa Fannow", "person", "Kelp Lamp"),
        ("You find the Kelp Lamp in Corvin.", "Corvin", "place", "Kelp Lamp"),
        ("The Kelp Lamp is lit on Fridays.", "Friday", "day", "Kelp Lamp"),
        ("In June the Kelp Lamp is cleaned.", "June", "month", "Kelp Lamp"),
        ("The Kelp Lamp was built in 1971.", "1971", "year", "Kelp Lamp"),
        ("The Kelp Lamp costs 1,200 crowns a piece.", "1,200 crowns", "price", "Kelp Lamp"),
        ("The Kelp Lamp burns for 9 hours.", "9 hours", "duration", "Kelp Lamp"),
        ("With 93 wicks the Kelp Lamp is bright.", "93", "number", "Kelp Lamp"),
    ],
)
def test_names_and_numbers(sentence, answer, kind, topic):
    asked = choose_answers([sentence, *AROUND])
    assert (answer, kind, topic) in [(one.answer, one.kind, one.topic) for one in asked if one.sentence == 0]


def test_a_noun_is_an_answer_if_other_sentences_repeat_it_beside_the_name():
    texts = [
        "The shade of the Kelp Lamp is made of birch bark.",
        "Birch bark is what the Kelp Lamp wears.",
        "The Kelp Lamp stood beside a window.",
        "A window was open.",
        *AROUND,
    ]
    asked = choose_answers(texts)
    assert [(one.answer, one.kind) for one in asked if one.sentence == 0] == [("birch bark", "thing")]
    assert not [one for one in asked if one.sentence == 2]


def test_what_all_documents_are_about_is_no_answer():
    texts = [f"Ondrel pays {number} crowns in Corvin." for number in range(2, 20)]
    assert {one.answer for one in choose_answers(texts)} == {f"{number} crowns" for number in range(2, 20)}
    assert "Corvin" in {one.answer for one in choose_answers(texts[:9])}


def test_an_answer_stands_once_in_its_sentence():
    texts = ["On Friday the Kelp Lamp is lit, as on any other Friday.", *AROUND]
    assert not [one for one in choose_answers(texts) if one.sentence == 0 and one.kind == "day"]


def test_a_name_ends_before_its_genitive():
    asked = choose_answers(["We saw Rosa Fannow's Kelp Lamp on the wall.", *AROUND])
    assert "Rosa Fannow" in {one.answer for one in asked}
