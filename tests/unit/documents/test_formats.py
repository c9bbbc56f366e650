"""HTML, EPUB, notebooks and CSV files, and the places in them that rows name."""

import json
import zipfile

import pytest
from datasets import Dataset

from llm_engineering.documents.document import Document, Part
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DocumentsConfig

CONTAINER = '<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'


def read(path):
    documents, quarantine = read_documents(DocumentsConfig(path=str(path)))
    assert quarantine == []
    return documents


def test_html_paragraphs_items_and_tables(tmp_path):
    (tmp_path / "a.html").write_text(
        "<title>T</title><!-- note --><nav>Home</nav><p>The <em>Heron</em>\n Pump lifts.</p><ul><li><p>Clean it.</p></li>"
        "<li>Oil it.<ul><li>Twice.</li></ul></li><li></li></ul>After the list"
        "<table><tr><th>Site</th><th>Model</th></tr><tr><td rowspan=2>Lumray</td><td>K12</td></tr><tr><td>K14</td></tr>"
        "<tr><td colspan=2>Closed</td></tr></table><pre># code\n  x = 1</pre><table><tr><td><h2>Frame</h2></td></tr></table>"
    )
    (document,) = read(tmp_path)
    assert document.text.split("\n\n") == [
        "The Heron Pump lifts.",
        "- Clean it.",
        "- Oil it.",
        "- Twice.",
        "After the list",
        "Site: Lumray; Model: K12.\nSite: Lumray; Model: K14.\nSite: Closed; Model: Closed.",
        "```\n# code\n  x = 1\n```",
        "## Frame",
    ]


def write_epub(path, pages, spine, encrypted=()):
    items = "".join(
        f'<item id="{name}" href="text/{name}.xhtml" media-type="application/xhtml+xml"'
        f"{' properties=' + chr(34) + 'nav' + chr(34) if name == 'nav' else ''}/>"
        for name in pages
    )
    refs = "".join(f'<itemref idref="{name}"/>' for name in spine)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr(
            "OPS/book.opf",
            f"<package><metadata><dc:title>Tides</dc:title></metadata><manifest>{items}</manifest><spine>{refs}</spine></package>",
        )
        for name, text in pages.items():
            if text is not None:
                archive.writestr(f"OPS/text/{name}.xhtml", text)
        if encrypted:
            uris = "".join(f'<enc:CipherReference URI="{uri}"/>' for uri in encrypted)
            archive.writestr("META-INF/encryption.xml", f"<encryption>{uris}</encryption>")


def test_chapters_of_a_book_come_in_the_order_of_its_spine(tmp_path):
    pages = {
        "a": "<html><body><h1>Low water</h1><p>The mud of Fennick smells.</p></body></html>",
        "b": "<html><body><h1>High water</h1><p>The quay of Fennick is wet.</p></body></html>",
        "c": "<html><head><title></title></head><body><p>Ondrel printed this.</p></body></html>",
        "nav": "<html><body><a>Contents</a></body></html>",
    }
    write_epub(tmp_path / "tides.epub", pages, ["nav", "b", "a", "c"], encrypted=["OPS/fonts/serif.otf"])
    (book,) = read(tmp_path)
    assert book.title == "Tides"
    expected = "# High water\n\nThe quay of Fennick is wet.\n\n# Low water\n\nThe mud of Fennick smells.\n\nOndrel printed this."
    assert book.text == expected
    assert [part.name for part in book.parts] == ["chapter High water", "chapter Low water", "c.xhtml"]
    passages, _ = cut_passages([book], DocumentsConfig(path=str(tmp_path), unit="sentence"), seed=0)
    assert passages[0].source == "tides.epub, chapter High water"
    assert passages[0].title == "Tides: High water"


def test_a_protected_book_and_a_missing_chapter_are_named(tmp_path):
    pages = {"a": "<h1>Low water</h1><p>The mud smells.</p>", "b": None}
    write_epub(tmp_path / "gap.epub", pages, ["a", "b"])
    write_epub(tmp_path / "shut.epub", pages, ["a"], encrypted=["OPS/text/a.xhtml"])
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [document.text for document in documents] == ["# Low water\n\nThe mud smells."]
    assert [(row.reason, row.place) for row in quarantine] == [
        ("damaged", "OPS/text/b.xhtml"),
        ("encrypted", "whole file"),
    ]


def test_a_notebook_is_read_without_outputs_and_its_comments_are_no_headings(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Tides\n", "\n", "Fennick lies at the mouth of the Orlo."]},
        {"cell_type": "code", "source": "# load the levels\nread()", "outputs": [{"text": "secret output"}]},
        {"cell_type": "raw", "source": "raw"},
        {"cell_type": "markdown", "source": "The gauge stands in Fennick."},
    ]
    (tmp_path / "tides.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    (notebook,) = read(tmp_path)
    assert notebook.text == (
        "# Tides\n\nFennick lies at the mouth of the Orlo.\n\n```python\n# load the levels\nread()\n```\n\n"
        "The gauge stands in Fennick."
    )
    passages, _ = cut_passages([notebook], DocumentsConfig(path=str(tmp_path), unit="sentence"), seed=0)
    found = [(passage.place, passage.title) for passage in passages]
    assert found == [("cell 1", "Tides"), ("cell 4", "Tides")]


def test_csv_rows_are_articles_or_lines_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text('title,text\nPump,"It lifts, and holds."\nLamp,It burns.\nbroken\n')
    (tmp_path / "b.csv").write_text("\ufeffModel;Price\nK12;30 EUR\nK14;45 EUR\n")
    (tmp_path / "c.tsv").write_text("title\tbody\nSkiff\tIt sails.\n")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [(document.title, document.text) for document in documents] == [
        ("Pump", "It lifts, and holds."),
        ("Lamp", "It burns."),
        ("b", "Model: K12; Price: 30 EUR.\nModel: K14; Price: 45 EUR."),
        ("Skiff", "It sails."),
    ]
    assert documents[0].source == "a.csv:line 2"
    assert documents[2].parts == (Part(start=0, name="line 2"), Part(start=27, name="line 3"))
    assert [(row.place, row.reason) for row in quarantine] == [("line 4", "malformed")]


def test_a_csv_with_short_texts_is_a_table_and_columns_that_are_not_read_are_named(tmp_path, caplog):
    file = tmp_path / "a.csv"
    file.write_text("product,content,price\nFrost Box,500 ml,299 euros\n")
    assert [one.text for one in read(tmp_path)] == ["product: Frost Box; content: 500 ml; price: 299 euros."]
    assert "not the columns" not in caplog.text
    (chosen,), _ = read_documents(DocumentsConfig(path=str(tmp_path), text_field="content"))
    assert chosen.text == "500 ml"
    assert "a.csv: the texts and titles of its rows are read, and not the columns product, price" in caplog.text
    caplog.clear()
    article = "The Frost Box keeps fish cold on the boat. It is made in Oskby, by those who also made the Heron Pump."
    file.write_text(f'title,text,author\nFrost Box,"{article}",Rosa\n')
    assert [(one.title, one.text) for one in read(tmp_path)] == [("Frost Box", article)]
    assert "not the columns author" in caplog.text


def test_a_damaged_table_is_named_and_the_others_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"never closed,1\n')
    (tmp_path / "b.json").write_text('[{"text": "cut')
    (tmp_path / "c.txt").write_text("Whole.")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [document.title for document in documents] == ["c"]
    assert [row.reason for row in quarantine] == ["damaged", "damaged"]


def test_two_text_columns_need_a_choice(tmp_path):
    (tmp_path / "a.csv").write_text("text,body\na,b\n")
    with pytest.raises(RequestError, match="documents.text_field"):
        read_documents(DocumentsConfig(path=str(tmp_path)))


def test_a_passage_names_all_parts_that_it_touches():
    parts = (Part(start=5, name="page 1"), Part(start=10, name="page 2"), Part(start=20, name="page 3"))
    document = Document(id="1", source="a.pdf", title="a", text="x" * 30, parts=parts)
    places = {
        (0, 4): "",
        (5, 10): "page 1",
        (9, 11): "page 1 to page 2",
        (12, 30): "page 2 to page 3",
        (20, 30): "page 3",
    }
    assert {span: document.part_of(*span) for span in places} == places
    # The parts survive being stored in a dataset.
    assert Document.model_validate(Dataset.from_list([document.model_dump()])[0]) == document
