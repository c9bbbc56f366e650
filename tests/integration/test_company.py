"""The fifteen mixed files of a small company: each is read, gives rows, and keeps the places of its sentences."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks.company_files import EXAM, write_files
from llm_engineering.data.exam_answers import normalised_tokens
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import read_documents
from llm_engineering.documents.texts import document_rows, sentence_rows
from llm_engineering.evaluation.measures.exam import open_exam, read_exam
from llm_engineering.generation.facts import generate_facts
from llm_engineering.generation.types import Answer
from llm_engineering.recipe.data_blocks import DocumentsConfig
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import InstructionWriting

# The place in a row's source, by the ending of the file.
PLACES = {
    ".pdf": r"page \d",
    # The text below the title is in no section.
    ".docx": r"section [\w ]+|characters \d+-\d+",
    ".pptx": r"slide \d",
    ".csv": r"line \d",
    ".txt": r"characters \d+-\d+",
    ".md": r"characters \d+-\d+",
    ".html": r"characters \d+-\d+",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("company"))


@pytest.fixture(scope="module")
def config(files):
    return DocumentsConfig(path=str(files[0].parent), unit="sentence", max_passages=None)


@pytest.fixture(scope="module")
def documents(config):
    found, quarantine = read_documents(config)
    assert quarantine == []
    return found


@pytest.fixture(scope="module")
def passages(documents, config):
    return cut_passages(documents, config, seed=1)[0]


class Completer:
    """Writes questions about the topic of each request, all of them different."""

    identity = "template"

    def complete(self, prompts, sampling, what, banned=()):
        if what == "answers from the sentence":
            return [Answer(prompt.rpartition("Sentence: ")[2].partition("\n")[0]) for prompt in prompts]
        topics = [prompt.rpartition("Question about ")[2].rpartition(": ")[0] for prompt in prompts]
        return [Answer(f"has {topic} {number}?") for number, topic in enumerate(topics, start=5000)]


def test_there_are_fifteen_files_in_seven_formats(files):
    counts = Counter(file.suffix for file in files)
    assert counts == {".pdf": 3, ".docx": 3, ".pptx": 2, ".md": 3, ".txt": 2, ".html": 1, ".csv": 1}


def test_every_file_is_read_with_its_title_and_text(files, documents):
    assert [document.source for document in documents] == [file.name for file in files]
    titles = {document.source: document.title for document in documents}
    assert titles["product-mule.pdf"] == "Mule, the cargo bike"
    assert titles["staff-list.docx"] == "Who does what at Ferrow"
    assert titles["about-us.pptx"] == "Ferrow, cargo bikes from Mossgate"
    assert titles["faq.html"] == "Questions that customers of Ferrow ask"
    texts = {document.source: document.text for document in documents}
    # Rows of tables name their columns, and what is repeated on every page of the site is left out.
    assert "Name: Joren Falk; Task: head of the workshop; Days: Monday to Friday." in texts["staff-list.docx"]
    assert "Product: Wren folding bike; Price: 890 euros; Remark: weighs 11 kilograms." in texts["price-list.csv"]
    assert "Home" not in texts["faq.html"]


def test_rows_of_sentences_and_of_documents_come_from_every_file(files, documents, passages):
    assert {row.document for row in document_rows(documents)} == {file.name for file in files}
    assert {row.document for row in sentence_rows(passages)} == {file.name for file in files}


def test_questions_about_facts_come_from_every_file(files, passages):
    rows, _, _ = generate_facts(passages, Completer(), InstructionWriting(questions="fact"))
    assert {row.document for row in rows} == {file.name for file in files}


def test_the_place_of_each_sentence_stays_with_its_row(passages):
    for row in sentence_rows(passages):
        file = Path(row.document)
        place = row.source.removeprefix(row.document).lstrip(",: ")
        assert re.fullmatch(PLACES[file.suffix], place), row.source
    places = {(p.document, p.part) for p in passages}
    assert {("product-mule.pdf", "page 1"), ("product-mule.pdf", "page 2")} <= places
    assert {("about-us.pptx", f"slide {number}") for number in (2, 3, 4, 5)} <= places
    assert {("minutes-march.docx", f"section {name}") for name in ("Paint", "Delivery", "Quillport")} <= places


def test_each_fact_of_the_exam_stands_in_several_files_and_has_two_questions(documents):
    rows = [row for row in read_exam(ExamConfig(path=str(EXAM), control=None)) if row.kind == "single"]
    by_fact = defaultdict(list)
    for row in rows:
        by_fact[row.facts[0]].append(row)
    assert len(by_fact) >= 20
    texts = [f" {' '.join(normalised_tokens(document.text))} " for document in documents]
    for fact, questions in by_fact.items():
        assert len(questions) == 2
        answer = " ".join(normalised_tokens(questions[0].answers[0]))
        assert sum(f" {answer}" in text for text in texts) >= 2, fact


def test_no_question_of_the_exam_is_in_a_file(documents):
    texts = " ".join(document.text for document in documents).casefold()
    for line in EXAM.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["question"].casefold() not in texts


def test_retrieval_finds_passages_in_the_mixed_files(passages):
    exam = open_exam(ExamConfig(path=str(EXAM), control=None), passages)
    found = {row.id: retrieved for row, retrieved in zip(exam.rows, exam.retrieved, strict=True)}
    assert any("Wilma Prado" in passage.text for passage in found["bookkeeper-2"])
    assert all(found.values())
