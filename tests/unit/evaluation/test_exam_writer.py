"""An exam that is written from the documents: which wordings are held out, and which questions are kept."""

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import REPLAY, InstructionRow, Message, normalised
from llm_engineering.documents.passages import Passage
from llm_engineering.evaluation.exam_writer import write_exam
from llm_engineering.generation.types import Answer, Failure
from llm_engineering.recipe.data_blocks import SplitConfig
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import InstructionWriting

ALL_TRAINED = SplitConfig(validation_fraction=1e-9, test_fraction=1e-9)
FACTS = InstructionWriting(questions="fact")
PASSAGES = InstructionWriting(question_max_new_tokens=64)
BELLS = ("Alba", "Brano", "Corvo", "Delmo", "Elvas", "Fanto", "Gavro", "Holma", "Istra", "Jorvo", "Kelda", "Lomna", "Marba", "Norva")  # fmt: skip


def passage(text, document="bells.pdf", part="page 1"):
    return Passage(id=normalised(text), document=document, title="Bells", start=0, end=len(text), text=text, part=part)


def row(question, answer, document="bells.pdf", source=None, origin="fact"):
    return InstructionRow(
        prompt=[Message(role="user", content=question)],
        completion=[Message(role="assistant", content=answer)],
        source=source or f"{document}, page 1",
        origin=origin,
        document=document,
    )


def town(name):
    return f"{name}burg"


# A page with one sentence about each bell, and three questions about each.
SENTENCES = [passage(f"The bell {name} was cast long ago by the smiths of {town(name)}.") for name in BELLS]
ROWS = [
    row(question.format(name), town(name))
    for name in BELLS
    for question in ("Where was the bell {} cast?", "In which place was the bell {} cast?", "Where did smiths make {}?")
]

# Rows that nothing is asked about, so that a quarter of all rows is enough for all bells.
FILLER = [row(f"Who is number {number}?", "nobody") for number in range(30)]


class Writer:
    """A local model that answers with the last word of the sentence, or with `knows` if it gets no sentence."""

    identity = "scripted"
    writes_json = False
    temperature = 0.0

    def __init__(self, knows="Nowhere", misreads=()):
        self.knows, self.misreads, self.asked = knows, misreads, []

    def complete(self, prompts, sampling, what, banned=()):
        assert sampling.stop == ("\n",)
        self.asked += prompts
        return [self._answer(prompt.rpartition("\n\n")[2], "Sentence:" in prompt) for prompt in prompts]

    def _answer(self, asked, has_sentence):
        sentence, _, _ = asked.rpartition("\nQuestion: ")
        assert asked.endswith("?\nAnswer:")
        assert sentence.startswith("Sentence: ") == has_sentence
        if not has_sentence:
            return Answer(self.knows)
        misread = any(name in sentence for name in self.misreads)
        return Answer("Nowhere" if misread else sentence.rpartition(" ")[2].rstrip("."))


def written(rows=ROWS, sentences=SENTENCES, client=None, writing=FACTS, split=ALL_TRAINED, seed=1, questions=60):
    exam = ExamConfig(path="generated", questions=questions)
    found = write_exam(rows, sentences, client or Writer(), writing, exam, split, seed)
    ledger = Ledger()
    ledger.record("exam", found.read, len(found.rows), found.quarantine)
    return [one for one in found.rows if one.kind == "single"], found, ledger.by_reason("exam")


def test_one_wording_of_each_fact_is_held_out_and_the_others_are_not():
    rows = [*ROWS, row("What is rain?", "water", source="general", document="", origin=REPLAY)]
    # A quarter of the 42 rows
    questions, found, reasons = written(rows)
    assert len(questions) == 10
    assert {one.answers[0] for one in questions} <= set(map(town, BELLS))
    assert len({one.facts[0] for one in questions}) == 10
    assert reasons == {}
    first = questions[0]
    # "In which place was it cast?" and "Where was it cast?" are one wording, so neither is held out.
    assert all(one.question.startswith("Where did smiths make") for one in questions)
    name = first.answers[0].removesuffix("burg")
    assert first.facts == [f"{name}: {town(name)}"]
    assert first.documents == ["bells.pdf"]
    assert first.evidence == next(one.text for one in SENTENCES if name in one.text)
    assert first.is_right(town(name))
    assert len(found.rows) == 12


def test_a_fact_with_one_wording_alone_is_not_asked():
    only = [one for one in ROWS if "make" in one.prompt[0].content]
    questions, _, _ = written([*only, *ROWS[: 3 * 12]])
    assert not any(BELLS[12] in one.question or BELLS[13] in one.question for one in questions)
    assert written(only * 5)[1].rows == []


def test_the_wording_of_another_document_about_the_same_counts():
    other = [passage(f"The bell {name} comes from {town(name)}.", "towns.md") for name in BELLS]
    one_each = [one for one in ROWS if "make" in one.prompt[0].content]
    more = [row(f"From where does {name} come?", town(name), "towns.md") for name in BELLS]
    questions, _, _ = written([*one_each, *more, *FILLER], [*SENTENCES, *other])
    assert len(questions) == 14
    different = [row(f"From where does {name} come?", "elsewhere", "towns.md") for name in BELLS]
    assert written([*one_each, *different, *FILLER], [*SENTENCES, *other])[0] == []


def test_wordings_of_held_out_documents_are_neither_asked_nor_counted_as_trained():
    assert written(split=SplitConfig(validation_fraction=1e-9, test_fraction=0.9999999))[1].read == 0


def test_questions_that_the_writer_fails_with_the_passage_or_knows_without_are_set_aside():
    questions, found, reasons = written([*ROWS, *FILLER], client=Writer(knows="Albaburg", misreads=("Brano", "Corvo")))
    assert reasons == {"not_answered_with_passage": 2, "answered_without_passage": 1}
    assert len(questions) == 11
    assert not {"Albaburg", "Branoburg", "Corvoburg"} & {one.answers[0] for one in questions}
    detail = next(one.detail for one in found.quarantine if "Brano" in one.detail)
    assert detail == "the answer is Branoburg; the writer said: Nowhere"


def test_only_the_questions_that_are_missing_are_checked():
    client = Writer()
    questions, _, _ = written([*ROWS, *FILLER], client=client, questions=12)
    assert len(questions) == 12
    assert len(client.asked) == 24


def test_fewer_than_ten_questions_are_no_exam():
    _, found, reasons = written(client=Writer(misreads=BELLS[5:]))
    assert found.rows == []
    assert reasons == {"too_few_questions": 5, "not_answered_with_passage": 9}


def test_unanswerable_questions_are_a_fifth_as_many_and_no_sentence_answers_them():
    _, found, _ = written()
    without = [one for one in found.rows if one.kind == "unanswerable"]
    assert len(without) == 2
    assert all(any(name in one.question for name in BELLS) for one in without)
    assert not {normalised(one.question) for one in without} & {normalised(r.prompt[0].content) for r in ROWS}


def test_more_documents_change_few_of_the_questions():
    rows = [*ROWS, *FILLER]
    before = {one.question for one in written(rows[: 3 * 12] + rows[42:], questions=10)[0]}
    after = {one.question for one in written(rows, questions=10)[0]}
    assert len(before & after) >= 8
    assert before != {one.question for one in written(rows[: 3 * 12] + rows[42:], questions=10, seed=2)[0]}


class Endpoint:
    """An endpoint that copies the town, writes a question about the bell, and answers from the passage alone."""

    identity = "endpoint"
    writes_json = True
    temperature = None

    def __init__(self, town_of=town, question="Where did the smiths of the bell {} live?"):
        self.town_of, self.question, self.fields = town_of, question, []

    def answer(self, requests, sampling, what):
        self.fields.append((what, sampling.json_field))
        return [self._answer(request[0]["content"], what) for request in requests]

    def _answer(self, content, what):
        name = next(name for name in BELLS if name in content)
        if what == "facts for the exam":
            return Failure("bad_json", "no JSON") if name == "Alba" else Answer(self.town_of(name))
        if what == "questions for the exam":
            assert town(name) in content.partition("answers")[2]
            return Answer(self.question.format(name))
        return Answer(town(name) if "smiths of" in content.replace("the smiths of the bell", "") else "unknown")


PASSAGE_ROWS = [row(f"What about the bell {name}?", one.text) for name, one in zip(BELLS, SENTENCES, strict=True)]


def test_an_endpoint_writes_a_question_about_a_fact_of_each_trained_passage():
    client = Endpoint()
    questions, _, reasons = written(PASSAGE_ROWS, client=client, writing=PASSAGES)
    assert len(questions) == 13
    assert reasons == {"bad_json": 1}
    assert questions[0].evidence in {one.text for one in SENTENCES}
    assert [field for _, field in client.fields] == ["answer", "question", "answer", "answer"]
    # The passage of a row that was set aside is not asked about.
    assert len(written(PASSAGE_ROWS[:12], client=Endpoint(), writing=PASSAGES)[0]) == 11


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (Endpoint(town_of=lambda name: f"{name}stadt"), "not_verbatim"),
        (Endpoint(town_of=lambda name: f"bell {name} was cast long ago by"), "long_answer"),
        (Endpoint(question="Is the bell {0} from {0}burg?"), "answer_in_question"),
        (Endpoint(question="Name the town of the bell {}."), "not_a_question"),
        (Endpoint(question="What about the bell {}?"), "repeated_question"),
    ],
)
def test_what_an_endpoint_writes_is_checked_against_the_passage_and_the_rows(client, reason):
    _, found, reasons = written(PASSAGE_ROWS, client=client, writing=PASSAGES)
    assert found.rows == []
    assert reasons == {"bad_json": 1, reason: 13}


def test_if_one_wording_fails_another_one_is_tried():
    class Fussy(Writer):
        def _answer(self, asked, has_sentence):
            return Answer("Nowhere") if "make" in asked else super()._answer(asked, has_sentence)

    more = [row(f"From which river town is the bell {name}?", town(name)) for name in BELLS]
    questions, _, reasons = written([*ROWS, *more], client=Fussy())
    assert len(questions) == 14
    assert all(one.question.startswith("From which river town") for one in questions)
    assert set(reasons) == {"not_answered_with_passage"}
