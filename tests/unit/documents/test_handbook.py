"""The embedded handbook: its documents, the facts in them, the exam about them, and the general questions.

`handbook_facts.jsonl` lists every fact with the sentences that state it. Only the tests read it.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from llm_engineering.documents.fingerprints import document_fingerprints
from llm_engineering.documents.read import HANDBOOK, documents_hash, read_documents
from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK, DocumentsConfig

# Kinds of facts whose answers exclude each other: two documents must not give different ones.
EXCLUSIVE = {"place", "person", "weekday", "month", "colour", "material", "building", "mill"}
# What a document would have to say to answer an unanswerable question; patterns in lower case ignore case.
ABSENT = {
    "u01": r"bank",
    "u02": r"treasurer (is|was|,)",
    "u03": r"\b(street|lane|row|road)\b.*(head office|Ondrel)",
    "u04": r"telephone number|phone number|call us",
    "u05": r"Heron Pump.*(crowns|costs)",
    "u06": r"Heron Pump.*(design|drew|invent)",
    "u07": r"Pebble Stove.*(design|drew|invent)",
    "u08": r"Otter Gate.*(design|drew|invent)",
    "u09": r"Gannet Winch.*(weigh|kilo|pound)",
    "u10": r"Gannet Winch.*(colour|paint|red|green|blue|plum|orange)",
    "u11": r"metre|\bfeet\b",
    "u12": r"Wisp Skiff.*(crowns|costs)",
    "u13": r"wheel.*(made of|elm|oak|larch)",
    "u14": r"Thimble Mill.*(was built|built in|\b1\d\d\d)",
    "u15": r"storey",
    "u16": r"Bantam Mill.*miller|miller.*Bantam",
    "u17": r"Bantam.*(crowns|cost)",
    "u18": r"captain|skipper",
    "u19": r"(Sandling|ferry).*(Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday)",
    "u20": r"band called|the band .* plays",
    "u21": r"(won|winner).*last year|last year.*(won|winner)",
    "u22": r"Tide Fair.*(hundred|thousand)",
    "u23": r"breed\b",
    "u24": r"(Mossop|cat).*(years old|\bage\b)",
    "u25": r"\bborn\b",
    "u26": r"\bpages\b",
    "u27": r"Tool Loft.*(hundred|\d+ tools)",
    "u28": r"Tool Loft.*(Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday|open)",
    "u29": r"wage|salary|\bearn|\bpay of\b",
    "u30": r"first tutor|tutor before|took over from",
    "u31": r"helmets? (comes?|are made|is made|bought) (from|by)",
    "u32": r"[A-Z]\w+ Farm",
    "u33": r"sack.*(kilo|weigh|pound)",
    "u34": r"paint.*(bought|buy|seller|from [A-Z])",
    "u35": r"Quessby.*\b1\d\d\d\b",
    "u36": r"Wexdown.*(people work|\d+ people|employs)",
    "u37": r"Gannet Winch.*(guarant|years)",
    "u38": r"Sorrel Mill.*miller|miller.*Sorrel",
    "u39": r"lamps?.*(a year|each year|per year)",
    "u40": r"Tollow Fund.*(crowns|\d\d)",
}


def records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


DOCUMENTS = {file.name: file.read_text(encoding="utf-8") for file in sorted((HANDBOOK / "documents").iterdir())}
FACTS = {fact["id"]: fact for fact in records(Path(__file__).with_name("handbook_facts.jsonl"))}
EXAM = records(HANDBOOK / "exam.jsonl")
CONTROL = records(HANDBOOK / "control.jsonl")


def plain(text):
    """Lower case, words and numbers only, one space between them."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def sentences(text):
    """Lines without markup, cut at the end of each sentence."""
    text = re.sub(r"<[^>]+>", "\n", text).replace("**", "")
    return [part.strip() for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+", line) if part.strip()]


def holds(text, word):
    return re.search(rf"(?<![a-z0-9]){re.escape(word.lower())}", text.lower()) is not None


def test_the_handbook_is_read_without_a_path_of_this_machine():
    config = DocumentsConfig(path=EMBEDDED_HANDBOOK)
    documents, quarantine = read_documents(config)
    assert not quarantine
    assert [d.source for d in documents] == [f"handbook/{name}" for name in DOCUMENTS]
    assert list(document_fingerprints(config)) == [d.source for d in documents]
    # HTML is read as text.
    page = next(d for d in documents if d.source == "handbook/site-lumray.html")
    assert "<p>" not in page.text
    assert documents_hash(config) == documents_hash(config) != documents_hash(DocumentsConfig())


def test_no_sentence_of_the_documents_stands_twice():
    assert len(DOCUMENTS) == 50
    openings = Counter(plain(s) for text in DOCUMENTS.values() for s in sentences(text) if len(s.split()) > 6)
    assert [sentence for sentence, count in openings.items() if count > 1] == []


@pytest.mark.parametrize("key", FACTS)
def test_a_fact_stands_in_its_documents_in_several_wordings(key):
    fact = FACTS[key]
    assert fact["answer"].lower() in fact["fact"].lower()
    assert fact["documents"] == sorted(fact["evidence"])
    stated = [text for text in fact["evidence"].values() if not text.startswith("|")]
    assert len({plain(text) for text in stated}) == len(stated) >= 3
    for name, text in fact["evidence"].items():
        assert text in DOCUMENTS[name]
        assert holds(text, fact["answer"])
    others = {other["answer"] for other in FACTS.values() if other["kind"] == fact["kind"]} - {fact["answer"]}
    stating = 0
    for name, text in DOCUMENTS.items():
        for sentence in sentences(text):
            if sentence[-1] != "?" and all(term.lower() in sentence.lower() for term in fact["subject_terms"]):
                if holds(sentence, fact["answer"]):
                    assert name in fact["documents"], sentence
                    stating += 1
                # No sentence about the subject has the form of the fact with another answer.
                elif fact["kind"] in EXCLUSIVE:
                    swapped = [fact["fact"].replace(fact["answer"], other) for other in others]
                    assert plain(sentence) not in map(plain, swapped)
    assert stating >= 3


def test_the_exam_asks_each_fact_twice():
    assert len(FACTS) == 80
    assert Counter(row["kind"] for row in EXAM) == {"single": 160, "multi_hop": 30, "unanswerable": 40}
    assert Counter(row["facts"][0] for row in EXAM if row["kind"] == "single") == dict.fromkeys(FACTS, 2)
    assert {len(row["facts"]) for row in EXAM if row["kind"] == "multi_hop"} == {2}
    assert len({row["id"] for row in EXAM}) == len(EXAM)
    assert len({plain(row["question"]) for row in EXAM + CONTROL}) == len(EXAM) + len(CONTROL)
    for row in EXAM:
        assert row["documents"] == sorted({name for key in row["facts"] for name in FACTS[key]["documents"]})


def test_no_question_of_the_exam_stands_in_a_document():
    everything = f" {' '.join(plain(re.sub('<[^>]+>', ' ', text)) for text in DOCUMENTS.values())} "
    assert [row["id"] for row in EXAM if f" {plain(row['question'])} " in everything] == []


def test_the_answers_of_the_exam_stand_in_the_documents_and_not_in_the_questions():
    for row in EXAM:
        if row["kind"] == "unanswerable":
            assert not row["answers"]
            continue
        evidence = " ".join(text for key in row["facts"] for text in FACTS[key]["evidence"].values()).lower()
        assert row["answers"][0].lower() in evidence, row["id"]
        for answer in row["answers"]:
            assert not re.search(rf"\b{re.escape(answer.lower())}\b", row["question"].lower()), row["id"]


def test_a_multi_hop_question_does_not_name_the_entity_in_between():
    for row in EXAM:
        if row["kind"] == "multi_hop":
            first, second = (FACTS[key] for key in row["facts"])
            between = first["subject"] if first["subject"] == second["subject"] else first["answer"]
            assert not holds(row["question"], between), row["id"]


def test_the_documents_do_not_answer_the_unanswerable_questions():
    assert {row["id"] for row in EXAM if row["kind"] == "unanswerable"} == ABSENT.keys()
    for key, pattern in ABSENT.items():
        flags = re.IGNORECASE if pattern.islower() else 0
        assert not [s for text in DOCUMENTS.values() for s in sentences(text) if re.search(pattern, s, flags)], key


def test_the_general_questions_do_not_name_the_organisation():
    assert len(CONTROL) == 120
    names = {
        f["answer"].lower()
        for f in FACTS.values()
        if f["answer"][0].isupper() and f["kind"] not in ("weekday", "month")
    }
    for row in CONTROL:
        assert row["kind"] == "control"
        assert row["answers"]
        assert not any(name in row["question"].lower() for name in names | {"ondrel"}), row["id"]
