"""Which answers of the exam are right, and which decline to answer."""

import pytest

from llm_engineering.data.exam_answers import abstains, answers_right, first_sentence


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("Varnholt", "Varnholt"),
        ("varnholt.", "Varnholt"),
        ("The head office of Ondrel is in Varnholt, close to the quay.", "Varnholt"),
        ("It is a hare", "hare"),
        ("A hare.", "the hare"),
        ("birch-bark", "birch bark"),
        ("Esther Tollow founded Ondrel in 1971 and led it for years.", "Esther Tollow"),
        ("Esther Tollow's work", "Tollow"),
        ("Café Zoë", "cafe zoe"),
        ("यह किताब है।", "किताब"),
        ("Sure! It is Varnholt. It is by the sea.", "Varnholt"),
        ("Who founded it? Esther Tollow.", "Esther Tollow"),
        ("It was St. Ives.", "St. Ives"),
        # Numbers
        ("six", "6"),
        ("6", "six"),
        ("Ninety-three people", "93"),
        ("It costs 1,250 crowns.", "1250 crowns"),
        ("1 250", "1250"),
        ("2.50", "2.5"),
        ("2,5", "2.5"),
        ("two and a half", "2.5"),
        ("one thousand two hundred and five", "1205"),
        ("a hundred", "100"),
        ("nineteen seventy-one", "1971"),
        ("twenty twenty-six", "2026"),
        ("five hundred thousand", "500,000"),
        ("the 3rd floor", "third floor"),
        ("minus 18", "-18"),
        ("-18 degrees", "minus eighteen degrees"),
        ("5 million", "5,000,000"),
        ("0.5 million", "five hundred thousand"),
        ("two billion", "2,000,000,000"),
        ("3-5 days", "3 to 5 days"),
        ("three to five days", "3-5 days"),
        # Units
        ("85kg", "85 kilograms"),
        ("85 kilos", "85 kg"),
        ("ten percent", "10 %"),
        ("10%", "ten percent"),
        ("$5", "$5.00"),
        ("six days", "6 days"),
        ("€500", "500 euros"),
        ("EUR 500.", "500 euros"),
        ("It costs $5 million, in all", "5 million dollars"),
        # Dates
        ("on 4 March 1971", "4 March 1971"),
        ("March 4, 1971", "4 March 1971"),
        ("the 4th of March 1971", "1971-03-04"),
        ("1971-03-04", "March 4th, 1971"),
        ("On 4 March 1971.", "1971"),
        ("on March 4", "4 March"),
        ("March the 4th", "4 March"),
        ("31.12.2024", "December 31, 2024"),
        ("Dec 31, 2024", "December 31, 2024"),
        ("9 a.m.", "9 am"),
        ("It is 9am, as ever", "9 a.m."),
        ("17:30", "5:30 pm"),
        ("5:30 p.m.", "17:30"),
        ("from 9 a.m. to 5 p.m.", "9:00 am-17:00"),
        # Letters and names
        ("A", "A"),
        ("It is A.", "A"),
        ("Plan A is the cheapest", "Plan A"),
        ("THIS IS A HARE", "hare"),
        ("KX200", "KX-200"),
        ("It is Prof. Anna Berg.", "Anna Berg"),
        ("It is approx. 35 euros.", "35 euros"),
        # Remarks on the answer, and lists that are the answer
        ("Thimble Mill, which is in Oskby", "Thimble Mill"),
        ("In February, every year", "February"),
        ("It is delivered on Fridays, not on Monday", "Fridays"),
        ("red and white", "red and white"),
        ("the chair, Gordon Brask", "Gordon Brask"),
        ("オンドレルの本部", "本部"),
    ],
)
def test_an_accepted_answer_in_other_writing_is_right(answer, accepted):
    assert answers_right(answer, ["something else", accepted], "Who is the chair?")


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("", "Varnholt"),
        ("   \n", "Varnholt"),
        ("60", "6"),
        ("6", "60"),
        ("6.5", "6"),
        ("-6", "6"),
        ("16", "6"),
        ("6B", "6"),
        ("6th", "6"),
        ("Varnholters", "Varnholt"),
        ("Tollow", "Esther Tollow"),
        ("Tollow Esther", "Esther Tollow"),
        ("85", "85 crowns"),
        ("85 days", "85 crowns"),
        ("5 March 1971", "4 March 1971"),
        ("twenty-six", "6"),
        ("one hundred and six", "6"),
        ("minus 18 degrees", "18 degrees"),
        ("5 million", "5"),
        ("1.2.30", "1.2.3"),
        ("10.0.0.10", "10.0.0.1"),
        ("17:30", "17"),
        ("Plan B", "Plan A"),
        ("Vitamin B", "Vitamin A"),
        # Only the first sentence counts.
        ("It is in Dunvey. Or in Varnholt.", "Varnholt"),
        ("Dunvey\nVarnholt", "Varnholt"),
        # Several candidates
        ("Varnholt, Dunvey, Oskby", "Varnholt"),
        ("Varnholt, Dunvey, Oskby", "Dunvey"),
        ("Varnholt, Dunvey, Oskby", "Oskby"),
        ("Varnholt and Dunvey", "Varnholt"),
        ("Varnholt or Dunvey", "Dunvey"),
        ("It is in Varnholt or in Dunvey", "Varnholt"),
        ("Varnholt/Dunvey", "Varnholt"),
        ("Varnholt; Dunvey", "Varnholt"),
        ("red, white and blue", "white"),
        ("between 6 and 60", "6"),
        ("6-60", "6"),
        ("3 to 5 days", "5 days"),
        ("Monday to Friday", "Monday"),
        ("from Monday through Friday", "Friday"),
        ("from 9 a.m. to 5 p.m.", "9 am"),
        ("Esther Tollow & Gordon Brask", "Gordon Brask"),
        ("It is " + "very " * 25 + "near Varnholt", "Varnholt"),
        # Denials
        ("It is not in Varnholt", "Varnholt"),
        ("It isn't Varnholt", "Varnholt"),
        ("Varnholt is not the town", "Varnholt"),
        ("It is no longer Varnholt", "Varnholt"),
        ("Less than 14 days", "14 days"),
        ("Not in Oskby, Varnholt", "Varnholt"),
        ("Varnholt, or in Dunvey", "Varnholt"),
        ("The documents do not say whether it is Varnholt", "Varnholt"),
        # The words differ in a vowel sign.
        ("यह काल है।", "कल"),
    ],
)
def test_another_answer_a_part_of_it_or_a_list_is_wrong(answer, accepted):
    assert not answers_right(answer, [accepted], "In which town is it?")


def test_words_of_the_question_are_no_candidates():
    question = "Who is the manager of the site at Lumray?"
    assert answers_right("Owen Tiblow, the manager", ["Owen Tiblow"], question)
    assert not answers_right("Owen Tiblow, the manager", ["Owen Tiblow"])
    assert answers_right("The one who is not paid is Kell", ["Kell"], "Who is not paid?")


@pytest.mark.parametrize(
    "answer",
    [
        "The documents do not say.",
        "The documents don’t say what it costs.",
        "I do not know.",
        "I don't know the answer to that.",
        "That is not mentioned in the handbook.",
        "I can't tell.",
        "I can not say. It may be Varnholt.",
        "There is no information about it.",
        "I do not have that information.",
        "The documents do not contain that.",
        "The documents do not provide that.",
        "There is no mention of that.",
    ],
)
def test_an_answer_that_declines_abstains(answer):
    assert abstains(answer)


@pytest.mark.parametrize(
    "answer", ["", "Varnholt", "It is unknowable. I do not know.", "I do not know, but it may be Varnholt.", "Say it."]
)
def test_an_answer_that_guesses_does_not_abstain(answer):
    assert not abstains(answer)


def test_the_first_sentence_is_not_cut_at_an_initial_or_in_a_number():
    assert first_sentence("By J. Kell in No. 5, for 2.50 crowns. More.") == "By J. Kell in No. 5, for 2.50 crowns"


@pytest.mark.parametrize("answer", ["yes", "Yes.", "Yes. It is open on Sundays.", "Sure! Yes, it is."])
def test_a_word_that_often_begins_an_answer_can_be_the_answer(answer):
    assert answers_right(answer, ["yes"], "Is the mill open on Sundays?")
    assert not answers_right(answer, ["no"], "Is the mill open on Sundays?")
