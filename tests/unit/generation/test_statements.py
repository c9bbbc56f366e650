"""Statements turned into questions by rule."""

import pytest

from llm_engineering.generation.answers import AnswerSpan
from llm_engineering.generation.statements import question_by_rule, questions_of_row


@pytest.mark.parametrize(
    ("sentence", "answer", "kind", "topic", "question"),
    [
        ("The founder of Corvin is Odo Renn.", "Odo Renn", "person", "Corvin", "Who is the founder of Corvin?"),
        ("The shade of the Kelp Lamp is birch bark.", "birch bark", "thing", "Kelp Lamp", "What is the shade of the Kelp Lamp?"),
        ("A Kelp Lamp is in Corvin.", "Corvin", "place", "Kelp Lamp", "Where is a Kelp Lamp?"),
        ("The Kelp Fair is in June, as ever.", "June", "month", "Kelp Fair", "When is the Kelp Fair?"),
        ("The cap of the Kelp Lamp is red.", "red", "thing", "Kelp Lamp", "What colour is the cap of the Kelp Lamp?"),
        ("The Corvin site was once a mill.", "mill", "thing", "Corvin", "What was the Corvin site once?"),
        ("Before the flood, Corvin was a port.", "port", "thing", "Corvin", "What was Corvin before the flood?"),
        ("In earlier times the Corvin site was a mill.", "mill", "thing", "Corvin", "What was the Corvin site in earlier times?"),
        ("At the Kelp Fair the prize is a spoon.", "spoon", "thing", "Kelp Fair", "What is the prize at the Kelp Fair?"),
        ("The Corvin site used to be a mill.", "mill", "thing", "Corvin", "What did the Corvin site use to be?"),
        ("Odo Renn, the keeper of Corvin, sings.", "Odo Renn", "person", "Corvin", "Who is the keeper of Corvin?"),
        ("Odo Renn leads Corvin.", "Odo Renn", "person", "Corvin", "Who leads Corvin?"),
        ("Woodworm closed Corvin, and it was sad.", "woodworm", "thing", "Corvin", "What closed Corvin?"),
        ("The Kelp Lamp is made in Corvin.", "Corvin", "place", "Kelp Lamp", "Where is the Kelp Lamp made?"),
        ("The Kelp Lamp was designed by Odo Renn.", "Odo Renn", "person", "Kelp Lamp", "Who was the Kelp Lamp designed by?"),
        ("The Kelp Fair takes place in June.", "June", "month", "Kelp Fair", "When does the Kelp Fair take place?"),
        ("The winner gets a spoon at the Kelp Fair.", "spoon", "thing", "Kelp Fair", "What does the winner get at the Kelp Fair?"),
        ("The Kelp Fund pays for spoons.", "spoons", "thing", "Kelp Fund", "What does the Kelp Fund pay for?"),
        ("The ferry to Corvin is called the Gull.", "Gull", "thing", "Corvin", "What is the ferry to Corvin called?"),
        ("Corvin was a port until the flood came.", "port", "thing", "Corvin", "What was Corvin until the flood came?"),
        ("On Mondays Corvin is shut to guests, as ever.", "Monday", "day", "Corvin", "When is Corvin shut to guests?"),
        ("The prize of the Kelp Fair, a spoon, is old.", "spoon", "thing", "Kelp Fair", "What is the prize of the Kelp Fair?"),
        ("Odo Renn, who leads Corvin, sings.", "Odo Renn", "person", "Corvin", "Who leads Corvin?"),
        ("A bed in Corvin is 9 crowns.", "9 crowns", "price", "Corvin", "How much is a bed in Corvin?"),
        ("The Kelp Fund helped Corvin with 45,000 crowns.", "Kelp Fund", "thing", "Corvin", "What helped Corvin with 45,000 crowns?"),
        ("A stay in Corvin takes 9 days.", "9 days", "duration", "Corvin", "How long does a stay in Corvin take?"),
    ],
)  # fmt: skip
def test_a_statement_becomes_the_question_that_it_answers(sentence, answer, kind, topic, question):
    assert question_by_rule(sentence, AnswerSpan(0, answer, kind, topic)) == question


@pytest.mark.parametrize(
    ("sentence", "answer", "kind"),
    [
        # The answer is a part of what is said.
        ("The prize of Corvin is a spoon or a cup.", "spoon", "thing"),
        ("The prize of Corvin is a spoon, or a cup.", "cup", "thing"),
        ("The prize of Corvin is a spoon of copper.", "spoon", "thing"),
        # The clause is part of another one.
        ("Remember that the Corvin fair is in June.", "June", "month"),
        ("Odo Renn says that the Corvin fair, which he leads, is loud.", "Odo Renn", "person"),
        ("The Kelp Lamp is shown to guests of Corvin on Mondays.", "guests", "thing"),
        ("The mill of Corvin, a port, and a spoon are old.", "spoon", "thing"),
        # Other things may stand there, too.
        ("The Kelp Lamp stands in Corvin.", "Kelp Lamp", "thing"),
        ("The price of Corvin remains 9 crowns.", "9 crowns", "price"),
        # "minus" is no verb.
        ("The mill of Corvin freezes them at minus 18 degrees.", "18 degrees", "measure"),
        # A pronoun needs the sentence before.
        ("It is made in Corvin by Odo Renn.", "Odo Renn", "person"),
    ],
)
def test_a_statement_in_another_form_gives_no_question(sentence, answer, kind):
    assert question_by_rule(sentence, AnswerSpan(0, answer, kind, "Corvin")) is None


def test_a_row_of_a_table_is_asked_for_its_cells_by_their_columns():
    row = "Name: Odo Renn; Role: keeper; Days: Monday to Friday; Until: June; IBAN: 7; Remark: one that is so long that nobody asks."
    found = {question: asked.answer for asked, question in questions_of_row(3, row)}
    assert found == {
        "What is the role of Odo Renn?": "keeper",
        "What are the days of Odo Renn?": "Monday to Friday",
        "What is the IBAN of Odo Renn?": "7",
    }
    assert {(asked.sentence, asked.topic) for asked, _ in questions_of_row(3, row)} == {(3, "Odo Renn")}
    assert list(questions_of_row(0, "Corvin has a rule: never swim; and a port.")) == []
