"""Questions that need two facts: their English, and what is not joined."""

import pytest

from llm_engineering.data.rows import InstructionRow, Message, written_as
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.derived.two_hop import two_hop_questions

# Sentences with the questions about them. Choosing an answer needs its name in two of them.
LOFT = ("keepers.md", "Irene Marrop looks after the Tool Loft.", "Who looks after the Tool Loft?", "Irene Marrop")
HOME = ("people.md", "Irene Marrop lives in Dunvey.", "Where does Irene Marrop live?", "Dunvey")
LAMP = ("lamps.md", "The Kelp Lamp is made in Ibbersea.", "Where is the Kelp Lamp made?", "Ibbersea")
SITE = (
    "sites.md",
    "The manager of the Ibbersea site is Frank Whin.",
    "Who is the manager of the Ibbersea site?",
    "Frank Whin",
)
DESIGN = ("design.md", "Alice Corven designed the Kelp Lamp.", "Who designed the Kelp Lamp?", "Alice Corven")
MILL = ("mill.md", "Thimble Mill stands in Oskby.", "Where does Thimble Mill stand?", "Oskby")
OPEN = ("visits.md", "Thimble Mill is open on Wednesdays.", "When is Thimble Mill open?", "Wednesday")
# So that "lamp" and "mill" are known as common nouns.
NOUNS = ("nouns.md", "A lamp or a mill is called what Ondrel calls it.", None, None)


def made(*facts, number=50, part_of=lambda document: "train"):
    passages, rows = [], []
    for start, (document, text, question, answer) in enumerate((*facts, NOUNS)):
        passage = Passage(id=str(start), document=document, title="t", start=start, end=start + 9, text=text)
        passages.append(passage)
        if question is not None:
            rows.append(
                InstructionRow(
                    prompt=[Message(role="user", content=question)],
                    completion=[Message(role="assistant", content=answer)],
                    source=passage.source,
                    origin="fact by a model",
                    document=document,
                )
            )
    return two_hop_questions(rows, passages, number, 1, part_of)


def texts(rows):
    return {row.prompt[0].content: row.completion[0].content for row in rows}


@pytest.mark.parametrize(
    ("facts", "questions"),
    [
        ((LOFT, HOME), {"Where does the person who looks after the Tool Loft live?": "Dunvey"}),
        (
            (LAMP, SITE),
            {"Who is the manager of the site in the place where the Kelp Lamp is made?": "Frank Whin"},
        ),
        (
            (LAMP, DESIGN),
            {
                "Where is the lamp that Alice Corven designed made?": "Ibbersea",
                "Who designed the lamp made in Ibbersea?": "Alice Corven",
            },
        ),
        ((MILL, OPEN), {"When is the mill in Oskby open?": "Wednesday"}),
        # Nothing is shared.
        ((LOFT, LAMP), {}),
    ],
)
def test_two_facts_that_share_a_name_give_a_question(facts, questions):
    rows = made(*facts)
    assert texts(rows) == questions
    for row in rows:
        assert all(f"{document}:" in row.source for document, *_ in facts)
        assert row.document in [document for document, *_ in facts]
        assert written_as(row) == "two_hop"


def changed(fact, **fields):
    return tuple(
        fields.get(name, old) for name, old in zip(("document", "text", "question", "answer"), fact, strict=True)
    )


@pytest.mark.parametrize(
    "last",
    [
        changed(HOME, document="keepers.md"),
        # Its sentence does not say that she lives there.
        changed(HOME, text="Irene Marrop likes Dunvey."),
        # The first sentence gives the answer away.
        changed(HOME, text="Irene Marrop lives in Loft.", answer="Loft"),
    ],
)
def test_facts_that_do_not_fit_are_not_joined(last):
    assert made(LOFT, last) == []


def test_a_question_with_words_that_its_sentence_does_not_have_is_not_joined():
    assert made(LAMP, SITE)
    assert made(LAMP, changed(SITE, text="The owner of the Ibbersea site is Frank Whin.")) == []
    assert made(changed(LAMP, text="The Kelp Lamp is sold in Ibbersea."), SITE) == []


def test_a_thing_is_no_person_and_an_object_is_no_subject():
    skiff = (
        "skiff.md",
        "The Wisp Skiff is built at the Lumray yard.",
        "Who is built at the Lumray yard?",
        "Wisp Skiff",
    )
    given = ("gift.md", "The meeting gave the Tool Loft to Irene Marrop.", "Who gave the Tool Loft?", "Irene Marrop")
    price = ("price.md", "A Wisp Skiff is sold in Dunvey.", "Where is the Wisp Skiff sold?", "Dunvey")
    assert not any("person who" in question for question in texts(made(skiff, price)))
    assert made(given, HOME) == []


def test_facts_of_two_splits_are_not_joined_and_the_number_is_a_limit():
    assert made(LOFT, HOME, part_of=lambda document: document) == []
    facts = (LOFT, HOME, LAMP, SITE, DESIGN, MILL, OPEN)
    assert len(made(*facts)) > 4
    assert len(made(*facts, number=2)) == 2
    assert made(*facts, number=2) == made(*facts, number=2)
