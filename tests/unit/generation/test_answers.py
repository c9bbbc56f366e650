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
        ("You find the Kelp Lamp in Little Ashby.", "Little Ashby", "place", "Kelp Lamp"),
        ("The Kelp Lamp is lit on Fridays.", "Friday", "day", "Kelp Lamp"),
        ("In June the Kelp Lamp is cleaned.", "June", "month", "Kelp Lamp"),
        ("The Kelp Lamp was built in 1971.", "1971", "year", "Kelp Lamp"),
        ("The Kelp Lamp costs 1,200 crowns a piece.", "1,200 crowns", "price", "Kelp Lamp"),
        ("The Kelp Lamp burns for 9 hours.", "9 hours", "duration", "Kelp Lamp"),
        ("With 93 wicks the Kelp Lamp is bright.", "93", "number", "Kelp Lamp"),
        ("The Kelp Lamp has 1900 wicks.", "1900", "number", "Kelp Lamp"),
        ("With 25 kilograms the Kelp Lamp is heavy.", "25 kilograms", "measure", "Kelp Lamp"),
        ("At minus 18 degrees the Kelp Lamp goes out.", "minus 18 degrees", "measure", "Kelp Lamp"),
        ("Members get 15% off the Kelp Lamp.", "15%", "measure", "Kelp Lamp"),
        ("The price of the Kelp Lamp is €1,200 now.", "€1,200", "price", "Kelp Lamp"),
        ("The Kelp Lamp burns from 9 to 18 o'clock.", "9 to 18 o'clock", "hour", "Kelp Lamp"),
        ("The Kelp Lamp is lit at 17:30.", "17:30", "hour", "Kelp Lamp"),
        ("The Kelp Lamp is lit at 10 p.m. by us.", "10 p.m.", "hour", "Kelp Lamp"),
        ("The Kelp Lamp earned €1.5 million so far.", "€1.5 million", "price", "Kelp Lamp"),
        ("The Kelp Lamp earned 5 million euros so far.", "5 million euros", "price", "Kelp Lamp"),
        ("The Kelp Lamp was lit on 31.12.2024 at last.", "31.12.2024", "day", "Kelp Lamp"),
        ("The Kelp Lamp was lit on 2020-05-01 at last.", "2020-05-01", "day", "Kelp Lamp"),
        ("The Kelp Lamp is lit on Mondays and Fridays.", "Monday and Friday", "day", "Kelp Lamp"),
        ("The Kelp Lamp is away from 3 to 17 August.", "3 to 17 August", "day", "Kelp Lamp"),
        ("On March 14 we light the Kelp Lamp.", "March 14", "day", "Kelp Lamp"),
        ("Write to lamp@kelp.example about the Kelp Lamp.", "lamp@kelp.example", "contact", "Kelp Lamp"),
        ("Read www.kelp.example about the Kelp Lamp.", "www.kelp.example", "contact", "Kelp Lamp"),
        ("The number of the Kelp Lamp is +44 1632 960417.", "+44 1632 960417", "contact", "Kelp Lamp"),
        ("Call (555) 010-0199 if the Kelp Lamp fails.", "(555) 010-0199", "contact", "Kelp Lamp"),
    ],
)
def test_names_and_numbers(sentence, answer, kind, topic):
    asked = choose_answers([sentence, *AROUND])
    assert (answer, kind, topic) in [(one.answer, one.kind, one.topic) for one in asked if one.sentence == 0]


@pytest.mark.parametrize(
    "value",
    [
        "-18 degrees", "-500 euros", "-2.5%", "1 500 euros", "1'000 francs", "+49 (0)30 123456-0", "5 °C", "1.2.3",
        "DE89 3704 0044 0532 0130 00", "24/7", "120 km/h", "less than 14 days", "at least 5", "5 euros, or 6 dollars",
        "14 days or more",
    ],
)  # fmt: skip
def test_a_part_of_a_value_is_no_answer(value):
    asked = choose_answers([f"The Kelp Lamp has {value} with us.", *AROUND])
    assert not [one.answer for one in asked if one.sentence == 0 and one.answer != "Kelp Lamp"]


def test_an_abbreviation_before_a_full_stop_is_no_answer():
    texts = [f"The Kelp Lamp is kept by {title}. Anna Berg." for title in ("Dr", "Prof", "Ms", "St")]
    asked = {one.answer for one in choose_answers([*texts, "Ask Dr or Prof or Ms or St.", *AROUND]) if one.sentence < 4}
    assert not asked & {"Dr", "Prof", "Ms", "St"}


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
    texts = ["Nobody runs Ondrel.", *(f"Ondrel pays {number} crowns in Corvin." for number in range(2, 20))]
    assert {one.answer for one in choose_answers(texts)} == {f"{number} crowns" for number in range(2, 20)}
    assert "Corvin" in {one.answer for one in choose_answers(texts[:9])}


def test_a_question_about_a_person_alone_is_about_what_all_documents_are_about():
    texts = [f"On day {number} we closed Ondrel." for number in range(20)]
    asked = choose_answers([*texts, "The books were kept by Rosa Fannow."])
    assert [one[1:] for one in asked if one.sentence == 20] == [("Rosa Fannow", "person", "Ondrel")]


def test_an_answer_that_stands_twice_is_asked_for_once():
    texts = ["On Friday the Kelp Lamp is lit, as on any other Friday.", *AROUND]
    assert [one.answer for one in choose_answers(texts) if one.sentence == 0] == ["Friday"]


@pytest.mark.parametrize(
    "sentence",
    [
        "Tell Rosa Fannow when the Kelp Lamp fails.",
        "The crew: Rosa Fannow; and the Kelp Lamp.",
        "In Corvin Rosa Fannow mends the Kelp Lamp.",
        "On Tuesdays Rosa Fannow mends the Kelp Lamp.",
    ],
)
def test_words_that_have_a_capital_for_another_reason_are_no_part_of_a_name(sentence):
    asked = choose_answers([sentence, "We know Rosa Fannow.", "They asked Rosa Fannow.", "I live in Corvin.", *AROUND])
    assert ("Rosa Fannow", "person", "Kelp Lamp") in [one[1:] for one in asked if one.sentence == 0]
    assert not {word for one in asked for word in one.answer.split()} & {"Tell", "Name", "Task"}


def test_a_house_and_its_street_are_one_place():
    texts = ["The Kelp Lamp hangs at Tanner Row 14.", "You find the Kelp Lamp at 12 Harbour Street.", *AROUND]
    asked = [one[:3] for one in choose_answers(texts)]
    assert (0, "Tanner Row 14", "place") in asked
    assert (1, "12 Harbour Street", "place") in asked
    assert "93" in {one.answer for one in choose_answers(["In Corvin 93 people like the Kelp Lamp.", *AROUND])}


def test_a_name_with_an_article_is_no_person():
    texts = ["Rosa Fannow wins the Bramble Ride.", "Few win the Bramble Ride.", "Ask Rosa Fannow.", *AROUND]
    assert [(one.answer, one.kind) for one in choose_answers(texts) if one.sentence == 0] == [
        ("Rosa Fannow", "person"),
        ("Bramble Ride", "thing"),
    ]


def test_a_verb_is_no_answer():
    texts = ["The Kelp Lamp glows.", "A Kelp Lamp glows at dusk.", "Dusk wakes the Kelp Lamp.", *AROUND]
    assert "glows" not in {one.answer for one in choose_answers(texts)}


def test_a_list_of_persons_and_a_question_have_no_answer():
    texts = ["Present were Rosa Fannow, Udo Fenn and Bela Orr.", "Is the Kelp Lamp lit on Friday?", *AROUND]
    assert not [one for one in choose_answers(texts) if one.sentence < 2]


def test_a_name_ends_before_its_genitive():
    asked = choose_answers(["We saw Rosa Fannow's Kelp Lamp on the wall.", *AROUND])
    assert "Rosa Fannow" in {one.answer for one in asked}


def test_a_row_of_a_table_has_no_answer():
    assert not [
        one
        for one in choose_answers(["Lamp: Kelp Lamp; Price: 9 crowns; Maker: Odo Renn.", *AROUND])
        if one.sentence == 0
    ]
