"""The texts, tokens and places of rows as the pages show them."""

from __future__ import annotations

import pytest

from llm_engineering.data.rows import LabelledRow, Message, PreferenceRow, PromptRow, TextRow
from llm_engineering.documents.document import Document, Part
from llm_engineering.documents.passages import Passage
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.review.row_views import parts_of, place_of, token_views, with_texts

ASKED = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
TEXT = "Zero. " * 500 + "The pump stands in the hall. " + "Nine. " * 500


def answer(text, **more):
    return Message(role="assistant", content=text, **more)


def pair():
    return PreferenceRow(prompt=ASKED, chosen=[answer("A.")], rejected=[answer("B.")], source="s", origin="m")


def labelled():
    return LabelledRow(prompt=ASKED, completion=[answer("A.")], label=True, source="s", origin="m")


def document(parts=()):
    return Document(id="1", source="guide.pdf", title="Guide", text=TEXT, parts=parts)


def test_every_text_of_a_row_has_a_name_and_a_path():
    row = pair().model_copy(update={"chosen": [answer("A.", reasoning_content="Hm."), answer("No.", weight=0)]})
    assert [(part.path, part.name, part.text) for part in parts_of(row)] == [
        ("prompt.0.content", "system", "Be brief."),
        ("prompt.1.content", "question", "Why?"),
        ("chosen.0.reasoning_content", "reasoning before the chosen answer", "Hm."),
        ("chosen.0.content", "chosen answer", "A."),
        ("chosen.1.content", "chosen answer, not trained", "No."),
        ("rejected.0.content", "rejected answer", "B."),
    ]
    prompt = PromptRow(prompt=ASKED, answers=["one", "two"], source="s", origin="m")
    assert [part.path for part in parts_of(prompt)][2:] == ["answers.0", "answers.1"]
    assert [part.path for part in parts_of(TextRow(text="t", source="s", origin="m"))] == ["text"]


@pytest.mark.parametrize(
    ("row", "kind", "path"),
    [
        (pair(), "preference", "rejected.0.content"),
        (labelled(), "labelled", "completion.0.content"),
        (TextRow(text="t", source="s", origin="m"), "text", "text"),
        (PromptRow(prompt=ASKED, answers=["one"], source="s", origin="m"), "prompt", "answers.0"),
    ],
)
def test_one_text_is_changed_and_the_others_stay(row, kind, path):
    changed = with_texts(row, kind, {path: "new"})
    assert [part.text for part in parts_of(changed) if part.path == path] == ["new"]
    assert [part for part in parts_of(changed) if part.path != path] == [p for p in parts_of(row) if p.path != path]
    with pytest.raises(RequestError, match="as they were"):
        with_texts(changed, kind, {path: "new"})


def test_a_label_can_be_changed():
    assert with_texts(labelled(), "labelled", {"label": "bad"}).label is False
    with pytest.raises(RequestError, match="no text label"):
        with_texts(pair(), "preference", {"label": "bad"})


def test_pairs_are_shown_as_two_answers_and_texts_whole(tokenizer):
    formatting = FormattingConfig(max_length=64)
    views, problem = token_views(pair(), "preference", tokenizer, formatting)
    assert [view.name for view in views] == ["chosen answer", "rejected answer"]
    assert problem == ""
    for view, text in zip(views, ("A.", "B."), strict=True):
        assert "".join(token for token, is_trained in view.tokens if is_trained) == f"{text}<|im_end|>"
        assert view.prompt.endswith("<|im_start|>assistant\n")
    views, _ = token_views(TextRow(text="One two.", source="s", origin="m"), "text", tokenizer, formatting)
    assert all(is_trained for _, is_trained in views[0].tokens)
    prompt = PromptRow(prompt=ASKED, answers=[], source="s", origin="m")
    views, _ = token_views(prompt, "prompt", tokenizer, formatting)
    assert views[0].prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("over_long", ["raise", "drop"])
def test_an_over_long_row_says_so(tokenizer, over_long):
    row = labelled().model_copy(update={"completion": [answer("word " * 200)]})
    views, problem = token_views(row, "labelled", tokenizer, FormattingConfig(max_length=64, over_long=over_long))
    assert views == []
    assert problem.startswith("over_long: ")


def test_the_passage_of_a_row_is_found_by_its_characters():
    start = TEXT.index("The pump")
    passage = Passage(id="", document="guide.pdf", title="", start=start, end=start + 28, text="")
    place = place_of(TextRow(text="t", source=passage.source, origin="m"), document(), whole=False)
    assert place.passage == "The pump stands in the hall."
    assert len(place.before) == len(place.after) == 1500
    assert not place.is_whole
    whole = place_of(TextRow(text="t", source=passage.source, origin="m"), document(), whole=True)
    assert whole.before + whole.passage + whole.after == TEXT
    assert whole.is_whole


@pytest.mark.parametrize(
    ("place", "start", "end"),
    [("page 1", 0, 300), ("page 2 to 3", 300, 600), ("page 1 to page 2 to 3", 0, 600), ("end", 600, len(TEXT))],
)
def test_the_part_of_a_document_is_found_by_its_name(place, start, end):
    parts = (Part(start=0, name="page 1"), Part(start=300, name="page 2 to 3"), Part(start=600, name="end"))
    row = TextRow(text="t", source=f"guide.pdf, {place}", origin="m")
    assert place_of(row, document(parts), whole=False).passage == TEXT[start:end]


@pytest.mark.parametrize("source", ["rows.jsonl:line 7", "guide.pdf, page 9", "guide.pdf"])
def test_without_a_place_the_start_of_the_document_is_shown(source):
    place = place_of(TextRow(text="t", source=source, origin="m"), document(), whole=False)
    assert (place.before, place.passage, place.after) == ("", "", TEXT[:1500])
