"""Rewritings by rule and by an endpoint, the check of their claims, their order, and the budget of tokens."""

from collections import Counter

import pytest

from llm_engineering.data.load import load_evaluation
from llm_engineering.data.rows import REPLAY, InstructionRow, Message, TextRow, split_of, written_as
from llm_engineering.documents.document import make_document
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.texts import sentence_rows
from llm_engineering.generation.derived.by_endpoint import prompt_file, rewrite_by_endpoint
from llm_engineering.generation.derived.by_rule import rewrite_by_rule
from llm_engineering.generation.derived.claims import missing_claims
from llm_engineering.generation.derived.rewritings import derive_texts, in_rounds, text_diversity
from llm_engineering.generation.prompts import PROMPT_FILES, read_prompt
from llm_engineering.generation.types import Answer, Failure
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import DocumentsConfig, FormattingConfig, SplitConfig
from llm_engineering.recipe.generation_blocks import BY_ENDPOINT, BY_RULE, ClientConfig, TextWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.recipe_keys import DerivingSetup

TEXT = "# Lamps\n\nThe Kelp Lamp is made in Ibbersea. Frank Whin runs Ibbersea.\n\n# Mills\n\nThe mill of Oskby grinds for Ondrel."
SPLIT = SplitConfig(validation_fraction=0.1, test_fraction=0.4)
# Their hashes put the first into the training split, and the other one into the test split.
TRAINED, HELD_OUT = (
    next(f"{n}.md" for n in range(99) if split_of(f"{n}.md", SPLIT) == side) for side in ("train", "test")
)
DOCUMENTS = [
    make_document(name, "Guide", TEXT if name == TRAINED else TEXT.replace("Kelp", "Sea"))
    for name in (TRAINED, HELD_OUT)
]
SENTENCES, _ = cut_passages(DOCUMENTS, DocumentsConfig(unit="sentence"), 1)


def question(text, answer, sentence, origin="fact by a model"):
    return InstructionRow(
        prompt=[Message(role="user", content=text)],
        completion=[Message(role="assistant", content=answer)],
        source=sentence.source,
        origin=origin,
        document=sentence.document,
    )


ASKED = [
    question("Where is the Kelp Lamp made?", "Ibbersea", SENTENCES[0]),
    question("Who runs Ibbersea?", "Frank Whin", SENTENCES[1]),
    question("What falls?", "Rain.", SENTENCES[0], REPLAY),
    question("Who runs the place of the lamp?", "Frank Whin", SENTENCES[1], "two_hop by rule"),
]


def by_rule(*kinds):
    made = rewrite_by_rule(kinds, DOCUMENTS[:1], [s for s in SENTENCES if s.document == TRAINED], ASKED, 1)
    assert {row.document for row in made} == {TRAINED}
    return made


def test_questions_become_an_faq_with_short_answers_and_a_dialogue_with_whole_ones():
    (faq,) = by_rule("faq")
    assert faq.text == "Guide\n\nWhere is the Kelp Lamp made?\nIbbersea.\n\nWho runs Ibbersea?\nFrank Whin."
    assert faq.source == f"{SENTENCES[0].source} to {SENTENCES[1].source}"
    assert written_as(faq) == "faq"
    (dialogue,) = by_rule("dialogue")
    assert dialogue.text == (
        "A: Where is the Kelp Lamp made?\nB: The Kelp Lamp is made in Ibbersea.\n"
        "A: Who runs Ibbersea?\nB: Frank Whin runs Ibbersea."
    )


def test_a_list_has_the_sentences_of_a_section_under_its_title():
    assert [row.text for row in by_rule("list")] == [
        "Guide: Lamps\n- The Kelp Lamp is made in Ibbersea.\n- Frank Whin runs Ibbersea.",
        "Guide: Mills\n- The mill of Oskby grinds for Ondrel.",
    ]


def test_reordered_sentences_stand_beside_those_with_the_same_name():
    (row,) = by_rule("reordered")
    sentences = [sentence.text for sentence in SENTENCES if sentence.document == TRAINED]
    assert sorted(row.text.replace(". ", ".\n").split("\n")) == sorted(sentences)
    # Both sentences about Ibbersea stand side by side.
    assert row.text.index(sentences[2]) == 0 or row.text.endswith(sentences[2])


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("The Heron Pump weighs 6 kilograms.", []),
        ("It weighs six kilograms, and 1,200 were sold in June.", []),
        ("Visitors like it: the pump is good.", []),
        ("A: Where is it made?\nB: It is made in Quessby.", []),
        ("Quessby's best-known pump is red.", []),
        ("The Heron Pump weighs 7 kilograms.", ["7"]),
        ("The Heron Pump weighs seven kilograms.", ["seven"]),
        ("It is sold in July.", ["July"]),
        ("It is made in Oskby.", ["Oskby"]),
        ("- Oskby makes it.", ["Oskby"]),
        ("Albert Renn makes it.", ["Albert", "Renn"]),
    ],
)
def test_names_numbers_and_dates_must_be_in_the_passage(text, missing):
    passage = "Pumps\nThe Heron Pump of Quessby weighs 6 kilograms, and 1200 were sold in June. It is best-known."
    assert missing_claims(text, passage, {"Oskby", "Quessby"}) == missing


class Writer:
    identity = "writer"
    writes_json = True
    temperature = 0.0

    def __init__(self, *outcomes):
        self.outcomes, self.asked = outcomes, []

    def answer(self, requests, sampling, what):
        assert sampling.json_field == "text"
        self.asked += requests
        return [self.outcomes[index % len(self.outcomes)] for index in range(len(requests))]


def test_an_endpoint_rewrites_each_passage_in_each_kind_and_wrong_claims_are_set_aside():
    client = Writer(
        Answer("In Ibbersea the Kelp Lamp is made."), Answer("Paul runs it for Paul."), Failure("bad_json", "x")
    )
    rows, rejected = rewrite_by_endpoint(SENTENCES[:3], client, TextWriting(rewritings=["summary", "reworded"]), 1)
    assert [(row.text, row.source, written_as(row)) for row in rows] == [
        ("In Ibbersea the Kelp Lamp is made.", SENTENCES[0].source, kind) for kind in ("summary", "reworded")
    ]
    assert [(row.reason, row.stage) for row in rejected] == [("claim_not_in_passage", "text"), ("bad_json", "text")] * 2
    assert "Paul" in rejected[0].detail
    assert SENTENCES[0].text in client.asked[0][0]["content"]
    copied, rejected = rewrite_by_endpoint(
        SENTENCES[:1], Writer(Answer(SENTENCES[0].text)), TextWriting(rewritings=["reworded"]), 1
    )
    assert (copied, rejected[0].reason) == ([], "copied_passage")


def test_every_kind_of_an_endpoint_has_a_prompt_that_is_watched():
    for kind in BY_ENDPOINT:
        assert "{passage}" in read_prompt(prompt_file(kind))
        assert prompt_file(kind) in {file.stem for file in PROMPT_FILES}


def test_every_beginning_of_the_rounds_is_mixed():
    rows = [
        TextRow(text=f"{kind} {document} {n}", source="s", origin=f"{kind} by rule", document=document)
        for kind in ("faq", "list")
        for document in ("a", "b")
        for n in range(3)
    ]
    ordered = in_rounds(rows, 1)
    assert Counter((row.origin, row.document) for row in ordered[:4]) == Counter(
        (r.origin, r.document) for r in rows[::3]
    )
    assert sorted(row.text for row in ordered) == sorted(row.text for row in rows)
    assert ordered == in_rounds(rows, 1) != in_rounds(rows, 2)


@pytest.fixture
def derive(settings, tiny_model):
    """A function that derives the rewritings of both documents with a budget of tokens."""
    model = ModelConfig(name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(model, settings)

    def made(tokens, kinds=BY_RULE):
        setup = DerivingSetup(
            writing=TextWriting(rewritings=list(kinds)),
            client=ClientConfig(),
            model=model,
            compute=ComputeConfig(),
            formatting=FormattingConfig(),
            tokens=tokens,
            epochs={"text": 2, "instruction": 3},
        )
        texts = sentence_rows(SENTENCES)
        return derive_texts(
            DOCUMENTS, SENTENCES, SENTENCES, texts, ASKED, setup, SPLIT, None, tokenizer if tokens else None, 1
        )

    return made


def test_rewritings_are_added_until_the_budget_is_reached(derive, caplog):
    free = derive(None)
    assert {row.document for row in free.rows} == {TRAINED}
    assert (len(free.rows), free.rejected, free.facts) == (5, [], {})
    most = derive(10**6)
    assert most.rows == free.rows
    documents, questions = most.facts["tokens_of_documents"], most.facts["tokens_of_questions"]
    assert documents > 0 < questions
    limit = most.facts["tokens_to_train"] - 1
    fewer = derive(limit)
    assert fewer.rows == free.rows[:-1]
    assert [row.reason for row in fewer.rejected] == ["over_budget"]
    assert documents + questions < fewer.facts["tokens_to_train"] <= limit
    assert not caplog.records
    none = derive(documents + questions - 1)
    assert none.rows == []
    assert f"{documents + questions:,.0f}, and knowledge.tokens is {documents + questions - 1:,}" in caplog.text
    assert len(none.rejected) == 5


def test_diversity_counts_rewritings_and_questions_of_two_facts(derive):
    plain = text_diversity([], [], SENTENCES, SPLIT)
    assert plain == {"wordings_per_fact": 1.0, "facts_without_question": 3, "distinct_trigrams": 1.0}
    found = text_diversity(derive(None, ("list", "faq")).rows, ASKED, SENTENCES, SPLIT)
    # Of three facts, each is a sentence and an item of a list; two are entries of the FAQ, and there are four questions.
    assert found["wordings_per_fact"] == round((3 + 3 + 2 + 4) / 3, 2)
    assert (found["rewritings_list"], found["rewritings_faq"], found["facts_without_question"]) == (2, 1, 1)
    assert found["distinct_trigrams"] < 1


def test_a_question_of_the_exam_is_found_within_a_rewriting():
    index = load_evaluation([], 13, ["Who runs Ibbersea?"])
    (faq,) = by_rule("faq")
    assert index.match(faq) == ""
    assert index.question_in(faq.text) == "who runs ibbersea"
    assert index.question_in("Frank Whin runs Ibbersea.") == ""
