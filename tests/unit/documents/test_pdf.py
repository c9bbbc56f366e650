"""PDF files: paragraphs, headings, tables and pages; running lines; files that cannot be read."""

import random

import pytest
from pypdf import PdfWriter

from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DocumentsConfig

LEFT, TOP, PITCH = 72, 720, 14
FONTS = {"plain": "F1", "bold": "F2"}


def line(text, y, x=LEFT, size=11, font="plain"):
    """The operators that draw a line of text."""
    shown = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return f"BT /{FONTS[font]} {size} Tf 1 0 0 1 {x} {y} Tm ({shown}) Tj ET"


def column(lines, top=TOP, **how):
    """Lines below each other; an empty one is a gap."""
    return [line(text, top - index * PITCH, **how) for index, text in enumerate(lines) if text]


def write_pdf(path, pages, title="", images=()):
    """Write a PDF. A page is a list of operators; `images` are the numbers of pages with an image."""
    count = len(pages)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {count} /Kids [{' '.join(f'{7 + 2 * n} 0 R' for n in range(count))}] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica-Bold /Encoding /WinAnsiEncoding >>",
        f"<< /Title ({title}) >>",
        "<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /BitsPerComponent 8 /ColorSpace /DeviceGray /Length 1 >>\n"
        "stream\n0\nendstream",
    ]
    for number, operators in enumerate(pages, start=1):
        image = "/XObject << /I 6 0 R >>" if number in images else ""
        content = "\n".join(operators)
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {len(objects) + 2} 0 R "
            f"/Resources << /Font << /F1 3 0 R /F2 4 0 R >> {image} >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    text, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(text))
        text += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R /Info 5 0 R >>\nstartxref\n{len(text)}\n%%EOF\n"
    path.write_bytes(f"{text}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode("latin-1"))
    return path


def read(path):
    documents, quarantine = read_documents(DocumentsConfig(path=str(path)))
    return documents[0], quarantine


def test_lines_become_paragraphs_also_across_pages(tmp_path):
    first = column([
        "The Heron Pump lifts forty litres of water in a minute, and its mainte-",
        "nance takes an hour. It was designed for high-pressure use by the en-",
        "gineers of Varnholt, who also built the well-",
        "known Kelp Lamp.",
        "",
        "The well-known lamp has a shade of birch bark, and the workshop in",
    ])  # fmt: skip
    second = column(["Ibbersea makes nine of them in a week."])
    document, quarantine = read(write_pdf(tmp_path / "manual.pdf", [first, second]))
    assert document.text.split("\n\n") == [
        "The Heron Pump lifts forty litres of water in a minute, and its maintenance takes an hour. It was designed for "
        "high-pressure use by the engineers of Varnholt, who also built the well-known Kelp Lamp.",
        "The well-known lamp has a shade of birch bark, and the workshop in Ibbersea makes nine of them in a week.",
    ]
    # The second page starts in the middle of a paragraph.
    assert [part.name for part in document.parts] == ["page 1", "page 2"]
    assert document.text[document.parts[1].start :].startswith("Ibbersea")
    assert quarantine == []


def test_running_headers_footers_and_page_numbers_are_removed(tmp_path):
    pages = [
        [
            line("Ondrel Ltd - Service manual", 770, size=8),
            line(f"Chapter {'ABC'[number // 3]} {number}", 755, size=8),
            *column([f"The {name} is described here, in one line.", "Read this first.", f"It is made in {name}ton."]),
            line(f"Page {number} of 7", 30, size=8),
        ]
        for number, name in enumerate(["Pump", "Lamp", "Skiff", "Winch", "Gate", "Mill", "Rope"], start=1)
    ]
    document, _ = read(write_pdf(tmp_path / "a.pdf", pages))
    assert "Ondrel" not in document.text
    assert "Chapter" not in document.text
    assert "Page" not in document.text
    # A sentence that repeats stays, because a line farther outside stays.
    assert document.text.count("Read this first.") == 7
    assert "The Skiff is described here, in one line." in document.text


def test_a_number_alone_is_a_page_number_only_if_it_fits_the_page(tmp_path):
    prices = ["The prices of the three vans are:", "299", "349", "35"]
    assert read(write_pdf(tmp_path / "a.pdf", [column(prices)]))[0].text.endswith("299 349 35")
    document, _ = read(write_pdf(tmp_path / "a.pdf", [column([*prices, "1", "1"])]))
    assert document.text.endswith("299 349 35 1")
    # At another height on each page, in a file that begins with page 41.
    pages = [column(["The Heron Pump is blue."] * length + [str(40 + length)]) for length in (1, 2, 3, 4)]
    assert "4" not in read(write_pdf(tmp_path / "a.pdf", pages))[0].text


def test_a_large_or_bold_line_is_a_heading(tmp_path):
    sentence = "The crank is fixed to the frame and cannot be lost, says the maker in Wexdown every year."
    operators = [
        line("Gannet Winch", 740, size=18, font="bold"),
        *column([sentence, sentence], top=710),
        line("Safety notes", 666, font="bold"),
        *column([sentence.replace("crank", "drum")], top=652),
    ]
    path = write_pdf(tmp_path / "winch.pdf", [operators, column([sentence])], title="Winches of Ondrel")
    document, _ = read(path)
    assert document.text.startswith(f"## Gannet Winch\n\n{sentence} {sentence}\n\n## Safety notes\n\nThe drum")
    config = DocumentsConfig(path=str(path), passage_min_chars=50, passage_max_chars=200)
    passages, _ = cut_passages([document], config, seed=0)
    assert passages[0].title == "Winches of Ondrel: Gannet Winch"
    assert passages[0].source == f"{path.name}, page 1"


def test_rows_of_a_table_and_items_of_a_list(tmp_path):
    rows = [["Model", "Price", "Weight"], ["K12", "30 EUR", "1.2 kg"], ["K14", "45 EUR", "1.4 kg"]]
    # 0x95 is the bullet of WinAnsiEncoding.
    table = [line(cell, 600 - 20 * i, x=72 + 150 * j) for i, row in enumerate(rows) for j, cell in enumerate(row)]
    items = [
        line("\x95", 500),
        line("Never open the K12.", 500, x=90),
        line("\x95", 486),
        line("Unplug it.", 486, x=90),
    ]
    text = column(["All prices are those of the year 2031, and no others hold."])
    document, _ = read(write_pdf(tmp_path / "a.pdf", [[*text, *table, *items]]))
    assert document.text.split("\n\n")[1:] == [
        "Model: K12; Price: 30 EUR; Weight: 1.2 kg.\nModel: K14; Price: 45 EUR; Weight: 1.4 kg.",
        "- Never open the K12.",
        "- Unplug it.",
    ]


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_a_file_with_a_password_is_named_and_one_that_only_forbids_printing_is_read(tmp_path, caplog, algorithm):
    plain = write_pdf(tmp_path / "plain.pdf", [column(["The safe is in the cellar."])])
    for name, password in (("secret", "1234"), ("no-printing", "")):
        writer = PdfWriter(clone_from=plain)
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
        writer.write(tmp_path / f"{name}.pdf")
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [document.title for document in documents] == ["no-printing", "plain"]
    assert [(row.source, row.reason) for row in quarantine] == [(str(tmp_path / "secret.pdf"), "encrypted")]
    assert "secret.pdf, whole file: encrypted (it has a password: save it without one" in caplog.text


@pytest.mark.parametrize("content", [b"", b"This is no PDF.", b"%PDF-1.4\n1 0 obj\n<< /Type /Cat"])
def test_a_broken_file_is_named_and_the_others_are_read(tmp_path, content):
    (tmp_path / "broken.pdf").write_bytes(content)
    write_pdf(tmp_path / "whole.pdf", [column(["The safe is in the cellar."])])
    documents, quarantine = read_documents(DocumentsConfig(path=str(tmp_path)))
    assert [document.title for document in documents] == ["whole"]
    assert [(row.reason, row.place) for row in quarantine] == [("damaged", "whole file")]


def test_a_truncated_file_is_read_as_far_as_it_goes_or_named(tmp_path):
    content = write_pdf(tmp_path / "whole.pdf", [column([f"Room {n} is locked."]) for n in range(9)]).read_bytes()
    for length in range(0, len(content), 97):
        (tmp_path / "whole.pdf").write_bytes(content[:length])
        try:
            read_documents(DocumentsConfig(path=str(tmp_path)))
        except RequestError as error:
            assert "damaged" in str(error) or "empty" in str(error)  # noqa: PT017


def test_scanned_pages_are_named(tmp_path):
    path = write_pdf(tmp_path / "scan.pdf", [[], []], images=[1, 2])
    with pytest.raises(RequestError, match="scanned .its pages are images without text: recognise the text first"):
        read(path)
    text = column(["The safe is in the cellar."])
    document, quarantine = read(write_pdf(tmp_path / "scan.pdf", [text, [], text], images=[1, 2]))
    # A logo beside the text makes no scan.
    assert [(row.reason, row.place) for row in quarantine] == [("scanned", "page 2")]
    assert [part.name for part in document.parts] == ["page 1", "page 3"]
    with pytest.raises(RequestError, match="empty .none of its 1 pages has text"):
        read(write_pdf(tmp_path / "scan.pdf", [[]]))


def test_a_file_of_500_pages_is_read_to_its_end(tmp_path):
    draw = random.Random(0)
    numbers = [draw.randrange(10**6) for _ in range(500)]
    pages = [column([f"The lamp {number} burns in the tower.", "It is lit at dusk."]) for number in numbers]
    path = write_pdf(tmp_path / "long.pdf", pages)
    document, quarantine = read(path)
    assert quarantine == []
    assert [part.name for part in document.parts] == [f"page {n}" for n in range(1, 501)]
    for number, part in zip(numbers, document.parts, strict=True):
        assert document.text[part.start :].startswith(f"The lamp {number} burns in the tower.")
