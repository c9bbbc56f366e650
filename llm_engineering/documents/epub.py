"""Reads EPUB books: a zip archive of XHTML pages, whose order is the spine of its package file."""

from __future__ import annotations

import posixpath
import zipfile
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup

from llm_engineering.data.rows import Quarantined
from llm_engineering.documents.document import Document, TextBuilder, UnreadableError, not_read, one_line
from llm_engineering.documents.markup import add_html
from llm_engineering.documents.zipped import open_zip

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_PAGES = ("application/xhtml+xml", "text/html")


def read_epub(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read the chapters of a book in the order of its spine. The table of contents is left out.

    Raises:
        UnreadableError: the file is no book, is copy-protected, or is too large when unpacked.
    """
    builder = TextBuilder()
    quarantine: list[Quarantined] = []
    with open_zip(file, "EPUB") as archive:
        package_path = _package_path(archive)
        package = _soup(archive, package_path)
        protected = _protected(archive)
        for path in _spine(package, posixpath.dirname(package_path)):
            if path in protected:
                raise UnreadableError("encrypted", "it is copy-protected: use an edition without protection")
            try:
                page = _soup(archive, path)
            except UnreadableError as error:
                quarantine.append(not_read(error.reason, file, path, error.detail))
                continue
            title = page.find(["h1", "h2", "h3"]) or page.title
            name = one_line(title.get_text(" ")) if title else ""
            builder.start_part(f"chapter {name}" if name else posixpath.basename(path))
            add_html(page, builder)
    title = package.find("dc:title")
    return [builder.document(str(file), one_line(title.get_text()) if title else file.stem)], quarantine


def _soup(archive: zipfile.ZipFile, path: str) -> BeautifulSoup:
    """A file of the book. The parser of HTML also reads its XML, and expands no entities of a document."""
    try:
        return BeautifulSoup(archive.read(path), "html.parser")
    except KeyError:
        raise UnreadableError("damaged", f"the book lacks its file {path}: copy or download it again") from None


def _package_path(archive: zipfile.ZipFile) -> str:
    root = _soup(archive, _CONTAINER).find("rootfile")
    path = str(root.get("full-path", "")) if root else ""
    if not path:
        raise UnreadableError("damaged", f"its {_CONTAINER} names no package file: it is no EPUB book")
    return path


def _spine(package: BeautifulSoup, folder: str) -> list[str]:
    """The paths of the chapters in the archive."""
    items = {str(item.get("id")): item for item in package("item")}
    pages = [items[key] for ref in package("itemref") if (key := str(ref.get("idref"))) in items]
    return [
        posixpath.normpath(posixpath.join(folder, unquote(str(item.get("href")))))
        for item in pages
        if item.get("media-type") in _PAGES and "nav" not in str(item.get("properties", "")).split()
    ]


def _protected(archive: zipfile.ZipFile) -> set[str]:
    """The encrypted files of the book. Many books encrypt their fonts, and can be read."""
    if _ENCRYPTION not in archive.namelist():
        return set()
    references = _soup(archive, _ENCRYPTION)("enc:cipherreference") + _soup(archive, _ENCRYPTION)("cipherreference")
    return {unquote(str(reference.get("uri"))) for reference in references}
