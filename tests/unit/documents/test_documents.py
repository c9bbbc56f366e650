"""Documents of every format, and passages with their positions."""

import json

import pytest

from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import documents_hash, read_documents
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DocumentsConfig

SENTENCE = "The river carries water from the mountains to the sea, and the people who live along it drink from it."


def test_a_folder_with_every_format(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("Plain")
    (tmp_path / "b.md").write_text("# Marked")
    (tmp_path / "c.html").write_text("<title>T</title><script>no</script><p>Hyper &amp; text</p>")
    (tmp_path / "d.json").write_text(json.dumps({"docs": [{"content": "First"}, {"content": "Second"}, {"x": 1}]}))
    (tmp_path / "e.jsonl").write_text('{"text": "Line"}\nbroken\n')
    (tmp_path / "f.bin").write_bytes(b"\0")
    (tmp_path / "g.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / ".hidden.txt").write_text("hidden")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [d.text for d in documents] == ["Plain", "# Marked", "Hyper & text", "First", "Second", "Line"]
    reasons = {(q.reason, q.place) for q in quarantine}
    assert reasons == {
        ("no_text_field", "docs[2]"),
        ("malformed", "line 2"),
        ("unknown_format", "whole file"),
        ("not_utf8", "byte 0"),
    }
    # A person who starts a run sees at once which files are missing from it.
    assert "Not read, 4 in all" in caplog.text
    assert "f.bin, whole file: unknown_format" in caplog.text


def test_two_text_fields_need_a_choice(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"text": "a", "content": "b"}]))
    with pytest.raises(RequestError, match=r"several text fields \(text, content\).*documents\.text_field"):
        read_documents(DocumentsConfig(path=str(file)))
    documents, _ = read_documents(DocumentsConfig(path=str(file), text_field="content"))
    assert [d.text for d in documents] == ["b"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "does not exist"),
        ("x.odt", "x", "in no known format"),
        ("empty.txt", " \n", "holds no document that can be read: .*empty"),
    ],
)
def test_unreadable_documents(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=words):
        read_documents(DocumentsConfig(path=str(tmp_path / name)))


def test_hash_notices_a_changed_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = documents_hash(DocumentsConfig(path=str(tmp_path)))
    (tmp_path / "a.txt").write_text("two")
    assert documents_hash(DocumentsConfig(path=str(tmp_path))) != before


def test_embedded_topics_do_not_repeat_each_other():
    documents, quarantine = read_documents(DocumentsConfig())
    assert len(documents) > 40
    assert {q.reason for q in quarantine} == {"contained"}
    # "for" is a section of "compound".
    assert "pydoc_data.topics:for" in {q.source for q in quarantine}


def test_passages_have_a_place_and_every_chunk_is_accounted_for(tmp_path):
    text = f"{SENTENCE}\n\n{SENTENCE}\n\n+---+---+\n| 1 | 2 |\n+---+---+\n\nshort\n\nIt is so. " + SENTENCE.replace(
        "river", "lake"
    )
    (tmp_path / "a.txt").write_text(text)
    config = DocumentsConfig(path=str(tmp_path), passage_min_chars=60, passage_max_chars=120)
    documents, _ = read_documents(config)
    passages, quarantine = cut_passages(documents, config, seed=0)
    assert passages[0].text == SENTENCE
    for passage in passages:
        assert " ".join(documents[0].text[passage.start : passage.end].split()) == passage.text
    assert "exact_duplicate" in {q.reason for q in quarantine}


def test_passages_are_drawn_with_the_seed_and_the_others_recorded():
    config = DocumentsConfig(max_passages=5)
    documents, _ = read_documents(config)
    one, rejected = cut_passages(documents, config, seed=1)
    assert one == cut_passages(documents, config, seed=1)[0]
    assert one != cut_passages(documents, config, seed=2)[0]
    assert len(one) == 5
    everything, _ = cut_passages(documents, DocumentsConfig(), seed=1)
    assert sum(q.reason == "not_drawn" for q in rejected) == len(everything) - 5


def test_a_heading_is_the_title_of_its_passages(tmp_path):
    """The first passage of a section begins with its first sentence, in Markdown and in HTML."""
    (tmp_path / "guide.md").write_text(
        f"# Rivers\n\n{SENTENCE * 2}\n\n## The sea\n\n{SENTENCE.replace('river', 'Orlo') * 2}\n"
    )
    (tmp_path / "page.html").write_text(
        f"<title>Lakes</title><h1>Cold <em>water</em></h1><p>{SENTENCE.replace('river', 'lake') * 2}</p>"
    )
    config = DocumentsConfig(path=str(tmp_path), passage_min_chars=100, passage_max_chars=300)
    documents, _ = read_documents(config)
    passages, quarantine = cut_passages(documents, config, seed=0)
    assert quarantine == []
    assert [passage.title for passage in passages] == ["guide: Rivers", "guide: The sea", "Lakes: Cold water"]
    assert [passage.text[:8] for passage in passages] == ["The rive", "The Orlo", "The lake"]
    texts = {document.source: document.text for document in documents}
    for passage in passages:
        assert " ".join(texts[passage.document][passage.start : passage.end].split()) == passage.text
