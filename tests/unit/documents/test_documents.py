"""Documents of every format, and passages with their positions."""

import json
import os
import shutil

import pytest

from llm_engineering.data.rows import split_key, split_of
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import documents_hash, read_documents
from llm_engineering.documents.texts import document_rows, sentence_rows
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DocumentsConfig, SplitConfig

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
        ("not_utf8", "byte 2"),
    }
    # A person who starts a run sees at once which files are missing from it.
    assert "Not read, 4 in all" in caplog.text
    assert "f.bin, whole file: unknown_format" in caplog.text


def test_the_properties_of_a_markdown_file_are_not_text(tmp_path):
    (tmp_path / "a.md").write_text("---\r\ntitle: Ships\r\ntags: [port]\r\n---\r\n\r\n# Harbour\r\n")
    (tmp_path / "b.md").write_text("---\nA text between two rules: it stays.\n---\nMore.")
    (tmp_path / "c.md").write_text("---\nOnly words\n---\nMore.")
    (tmp_path / "d.md").write_text("Text\n\n---\na: b\n---\n")
    documents, _ = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [(d.title, d.text.strip()[:9]) for d in documents] == [
        ("Ships", "# Harbour"), ("b", "---\nA tex"), ("c", "---\nOnly "), ("d", "Text\n\n---"),
    ]  # fmt: skip


def test_two_text_fields_need_a_choice(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"text": "a", "content": "b"}]))
    with pytest.raises(RequestError, match=r"several text fields \(text, content\).*documents\.text_field"):
        read_documents(DocumentsConfig(path=str(file)))
    documents, _ = read_documents(DocumentsConfig(path=str(file), text_field="content"))
    assert [d.text for d in documents] == ["b"]


def test_a_text_in_an_object_is_read_by_its_path(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"content": {"Body": "a", "Title": "t"}}, {"content.Body": "b"}, {"content": "c"}]))
    documents, quarantine = read_documents(DocumentsConfig(path=str(file), text_field="content.Body"))
    assert [d.text for d in documents] == ["a", "b"]
    assert [(q.reason, q.place) for q in quarantine] == [("no_text_field", "[2]")]
    file.write_text(json.dumps([{"content": {"Body": "a"}}]))
    with pytest.raises(RequestError, match=r"Its texts are in objects: set documents\.text_field to content\.Body"):
        read_documents(DocumentsConfig(path=str(file)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "Grüße\r\nText".encode("utf-16")),
        ("a.md", "Grüße\nText".encode("utf-16-be")),
        ("a.txt", "Grüße\nText".encode("utf-32")),
        ("a.csv", '\ufefftext\n"Grüße\nText"\n'.encode("utf-16-le")),
        ("a.html", "<meta charset=iso-8859-1><p>Grüße<br>Text".encode("cp1252")),
        ("a.html", '<?xml version="1.0" encoding="iso-8859-15"?><p>Grüße<br>Text</p>'.encode("iso-8859-15")),
        ("a.htm", "<meta charset=windows-1251><p>Grüße<br>Text".encode("utf-8-sig")),
        ("a.htm", "<p>Grüße<br>Text".encode("utf-16")),
    ],
)
def test_documents_are_read_in_their_encoding(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    documents, _ = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [d.text.split() for d in documents] == [["Grüße", "Text"]]


def test_a_page_that_is_not_in_its_declared_encoding_is_set_aside(tmp_path):
    (tmp_path / "a.html").write_bytes("<meta charset=utf-8><p>Grüße".encode("latin-1"))
    (tmp_path / "b.html").write_bytes(b"<meta charset=klingon><p>Text")
    (tmp_path / "c.txt").write_text("Text")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [d.title for d in documents] == ["c"]
    assert [q.reason for q in quarantine] == ["not_utf8", "damaged"]


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("Text")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    config = DocumentsConfig(path=str(tmp_path))
    documents, quarantine = read_documents(config)
    assert [d.text for d in documents] == ["Text"]
    assert [(q.reason, q.detail) for q in quarantine] == [
        ("broken_link", "it is a link to gone.txt, which does not exist")
    ]
    before = documents_hash(config)
    (tmp_path / "gone.txt").write_text("Text")
    assert documents_hash(config) != before


def test_the_header_of_an_article_stays_and_that_of_the_page_goes(tmp_path):
    (tmp_path / "a.html").write_text(
        "<header>Site</header><article><header><h1>Title</h1>By Ann</header><p>Text</p><nav>Up</nav></article><footer>Ltd</footer>"
    )
    documents, _ = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert documents[0].text == "# Title\n\nBy Ann\n\nText"


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


def test_a_folder_at_another_place_gives_the_same_rows_in_the_same_splits(tmp_path, monkeypatch):
    folder, moved = tmp_path / "docs", tmp_path / "below" / "renamed"
    for name in ("a.md", "inner/a.md", *(f"{number}.md" for number in range(20))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            f"# {name}\n\nThe Kelp Lamp of {name} was lit in 1931. Ada Brand built its tower in Ibbersea."
        )
    (folder / "table.csv").write_text("text\nThe Heron Pump lifts water.\nThe Skiff carries four people.\n")
    shutil.copytree(folder, moved)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder / "inner")

    def placed(path):
        config = DocumentsConfig(path=str(path), unit="sentence", max_passages=30)
        documents, _ = read_documents(config)
        rows = document_rows(documents) + sentence_rows(cut_passages(documents, config, seed=0)[0])
        return [(row.record(), split_of(split_key(row), SplitConfig())) for row in rows]

    first = placed(folder)
    assert {"a.md", "inner/a.md", "table.csv:line 3"} <= {row["document"] for row, _ in first}
    assert {split for _, split in first} == {"train", "validation", "test"}
    assert all(placed(path) == first for path in (moved, f"{folder}/", "..", "../../docs", "~/docs"))
    assert {row["document"] for row, _ in placed(".")} == {row["document"] for row, _ in placed("a.md")} == {"a.md"}


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


def test_files_whose_names_are_not_utf8_are_read_and_set_aside_under_printable_names(tmp_path):
    for name, content in ((b"bad-\xff.txt", "Text"), (b"bad-\xff.csv", "text\nRow\n"), (b"bad-\xff.bin", "")):
        (tmp_path / os.fsdecode(name)).write_text(content)
    config = DocumentsConfig(path=str(tmp_path))
    assert len(documents_hash(config)) == 16
    documents, quarantine = read_documents(config)
    assert [(d.source, d.title) for d in documents] == [
        ("bad-\\udcff.csv:line 2", "bad-\\udcff line 2"),
        ("bad-\\udcff.txt", "bad-\\udcff"),
    ]
    assert [q.source for q in quarantine] == [str(tmp_path / "bad-\\udcff.bin")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file_is_set_aside_and_the_others_are_read(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("Text")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [d.text for d in documents] == ["Text"]
    assert [q.reason for q in quarantine] == ["empty"]
