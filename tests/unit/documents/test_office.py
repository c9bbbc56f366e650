"""Word and PowerPoint files: headings, lists, tables, notes; files that are broken, have a password, or would fill the memory."""

import zipfile

import docx
import pptx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls

from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import read_documents
from llm_engineering.documents.texts import sentence_rows
from llm_engineering.recipe.data_blocks import DocumentsConfig


def read(path):
    documents, quarantine = read_documents(DocumentsConfig(path=str(path)))
    assert quarantine == []
    return documents[0]


def fill(table, rows):
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            table.cell(i, j).text = text


def test_word_headings_lists_and_tables(tmp_path):
    document = docx.Document()
    document.add_paragraph("Handbook of Ondrel", style="Title")
    document.sections[0].header.paragraphs[0].text = "Internal"
    document.add_paragraph("Ondrel was founded in Varnholt.")
    document.add_heading("Warranty", 1)
    document.add_paragraph("The Kelp Lamp has a warranty of nine years.")
    document.add_paragraph("Keep the receipt.", style="List Bullet")
    fill(document.add_table(3, 3), [["Model", "Price", "Weight"], ["K12", "30 EUR", "1.2 kg"], ["K14", "45 EUR", ""]])
    fill(document.add_table(2, 2), [["Founded", "1971"], ["City", "Varnholt"]])
    marked = document.add_table(2, 2)
    fill(marked, [["Site", "Manager"], ["Lumray", "Owen Tiblow"]])
    marked.rows[0]._tr.get_or_add_trPr().append(parse_xml(f"<w:tblHeader {nsdecls('w')}/>"))
    document.add_heading("Contact", 2)
    changed = document.add_paragraph("Write to ")
    for tag, word, text in (("ins", "Ruth Crole", "t"), ("del", "Susan Isker", "delText")):
        changed._p.append(parse_xml(f"<w:{tag} {nsdecls('w')}><w:r><w:{text}>{word}</w:{text}></w:r></w:{tag}>"))
    document.save(tmp_path / "a.docx")
    found = read(tmp_path / "a.docx")
    assert found.title == "Handbook of Ondrel"
    assert found.text.split("\n\n") == [
        "Ondrel was founded in Varnholt.",
        "# Warranty",
        "The Kelp Lamp has a warranty of nine years.",
        "- Keep the receipt.",
        "Model: K12; Price: 30 EUR; Weight: 1.2 kg.\nModel: K14; Price: 45 EUR.",
        "Founded: 1971.\nCity: Varnholt.",
        "Site: Lumray; Manager: Owen Tiblow.",
        "## Contact",
        "Write to Ruth Crole",
    ]
    assert [part.name for part in found.parts] == ["section Warranty", "section Contact"]
    config = DocumentsConfig(path=str(tmp_path), unit="sentence")
    rows = sentence_rows(cut_passages([found], config, seed=0)[0])
    by_text = {row.text: row for row in rows}
    row = by_text["Model: K12; Price: 30 EUR; Weight: 1.2 kg."]
    assert row.source == "a.docx, section Warranty"
    # All parts of a file are in the same split.
    assert {row.document for row in rows} == {"a.docx"}


def test_slides_have_titles_notes_tables_and_numbers(tmp_path):
    deck = pptx.Presentation()
    first = deck.slides.add_slide(deck.slide_layouts[0])
    first.shapes.title.text = "Pumps of 2031"
    second = deck.slides.add_slide(deck.slide_layouts[1])
    second.shapes.title.text = "Heron Pump"
    second.placeholders[1].text = "It lifts forty litres.\nIts body is bronze."
    second.notes_slide.notes_text_frame.text = "Harry Blent designed it."
    third = deck.slides.add_slide(deck.slide_layouts[6])
    table = third.shapes.add_table(2, 3, 0, 0, 100, 100).table
    fill(table, [["Model", "Price", "Weight"], ["K12", "30 EUR", "1.2 kg"]])
    group = third.shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, 10, 10).text_frame.text = "Prices hold until May."
    deck.save(tmp_path / "deck.pptx")
    found = read(tmp_path / "deck.pptx")
    assert found.title == "Pumps of 2031"
    assert found.text.split("\n\n") == [
        "## Pumps of 2031",
        "## Heron Pump",
        "- It lifts forty litres.\n- Its body is bronze.",
        "Harry Blent designed it.",
        "Model: K12; Price: 30 EUR; Weight: 1.2 kg.",
        "Prices hold until May.",
    ]
    passages, _ = cut_passages([found], DocumentsConfig(path=str(tmp_path), unit="sentence"), seed=0)
    places = {passage.text: (passage.source, passage.title) for passage in passages}
    assert places["Harry Blent designed it."] == ("deck.pptx, slide 2", "Pumps of 2031: Heron Pump")


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.epub", "a.ipynb"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no archive", "damaged"),
        (b"PK\x03\x04 cut off", "damaged"),
        # What Word writes for a file with a password is no zip archive, but the container of its older versions.
        (bytes.fromhex("d0cf11e0a1b11ae1"), "encrypted"),
    ],
)
def test_broken_files_are_named_and_the_others_are_read(tmp_path, caplog, name, content, reason):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "whole.txt").write_text("Whole.")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [document.title for document in documents] == ["whole"]
    expected = {"not_utf8" if content[0] > 127 else "damaged"} if name == "a.ipynb" else {reason}
    assert {row.reason for row in quarantine} == expected
    assert name in caplog.text


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.epub"])
def test_an_archive_without_its_files_is_named(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("other.xml", "<a/>")
    (tmp_path / "whole.txt").write_text("Whole.")
    _, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [row.reason for row in quarantine] == ["damaged"]


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.epub"])
def test_an_archive_that_would_fill_the_memory_is_named(tmp_path, name):
    with (
        zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("word/document.xml", "w") as stream,
    ):
        for _ in range(210):
            stream.write(bytes(1 << 20))
    assert (tmp_path / name).stat().st_size < 2 << 20
    (tmp_path / "whole.txt").write_text("Whole.")
    _, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [row.reason for row in quarantine] == ["too_large"]
    assert "210 MB of text and XML, and the limit is 200 MB" in quarantine[0].detail


def test_the_lock_files_of_office_are_named(tmp_path):
    (tmp_path / "~$a.docx").write_bytes(b"\0" * 54)
    (tmp_path / "whole.txt").write_text("Whole.")
    _, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [row.reason for row in quarantine] == ["lock_file"]
