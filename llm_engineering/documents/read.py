"""Reads documents: the embedded corpus, or a file or folder of text, Markdown, HTML, JSON or JSONL."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable
from pathlib import Path

from bs4 import BeautifulSoup
from pydantic import BaseModel, ConfigDict

from llm_engineering.data.files import BrokenRecord, read_records
from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.sources import visible_files
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, EMBEDDED_HANDBOOK, DocumentsConfig

logger = logging.getLogger(__name__)

# Files and records that the warning about unread ones names. The data report has all of them.
_NAMED = 5
TEXT_FIELDS = ("text", "content", "body", "markdown", "page_content")
TITLE_FIELDS = ("title", "name", "url", "link", "id")
# The embedded handbook: documents, the questions of its exam, and general questions.
HANDBOOK = Path(__file__).parent / "handbook"


class Document(BaseModel):
    """One document.

    Attributes:
        id: hash of the text.
        source: the file, with the place in it if the file holds several documents.
        title: the title in the source; without one, the name of the file.
        text: plain text.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    source: str
    title: str
    text: str


def read_documents(config: DocumentsConfig) -> tuple[list[Document], list[Quarantined]]:
    """Read all documents, sorted by source. Files and records that cannot be read are quarantined.

    Raises:
        RequestError: the path is missing, is a file in no known format, or holds no text at all.
    """
    if config.path == EMBEDDED_DOCUMENTS:
        return _python_reference()
    documents: list[Document] = []
    quarantine: list[Quarantined] = []
    for name, file in named_files(config.path).items():
        reader = _READERS.get(file.suffix.lower())
        if reader is None:
            detail = f"documents are {', '.join(sorted(_READERS))}"
            quarantine.append(_rejected("unknown_format", file, "whole file", detail))
            continue
        try:
            read, rejected = reader(file, config.text_field)
        except UnicodeDecodeError as error:
            quarantine.append(_rejected("not_utf8", file, f"byte {error.start}", "convert it, e.g. with iconv"))
            continue
        except OSError as error:
            quarantine.append(_rejected("unreadable", file, "whole file", str(error)))
            continue
        if name != str(file):
            read = [document.model_copy(update={"source": name}) for document in read]
        documents += [document for document in read if document.text.strip()]
        quarantine += rejected
        quarantine += [_rejected("empty", file, d.source, "no text") for d in read if not d.text.strip()]
    if not documents:
        problems = "; ".join(row.describe() for row in quarantine[:3]) or "the folder holds no file"
        raise RequestError(f"documents.path {config.path} holds no document that can be read: {problems}.")
    if quarantine:
        more = f"; and {len(quarantine) - _NAMED} more" if len(quarantine) > _NAMED else ""
        named = "; ".join(row.describe() for row in quarantine[:_NAMED])
        logger.warning("Not read, %d in all: %s%s", len(quarantine), named, more)
    return documents, quarantine


def documents_hash(config: DocumentsConfig) -> str:
    """Hash of everything that `read_documents` reads, to notice changed files.

    Raises:
        RequestError: the path is missing or is a file in no known format.
    """
    digest = hashlib.sha256()
    if config.path == EMBEDDED_DOCUMENTS:
        for name, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
            digest.update(f"{name}\0{text}\0".encode())
    else:
        for name, file in named_files(config.path).items():
            digest.update(name.encode() + b"\0")
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def named_files(path: str) -> dict[str, Path]:
    """The files that a `documents.path` names, by the name of each as a source.

    A file of the embedded handbook is named without the folder in which this package is installed.

    Raises:
        RequestError: the path is missing or is a file in no known format.
    """
    if path == EMBEDDED_HANDBOOK:
        return {f"handbook/{file.name}": file for file in visible_files(HANDBOOK / "documents")}
    return {str(file): file for file in document_files(path)}


def document_files(path: str) -> list[Path]:
    """The file, or the visible files in and below the folder, that a `documents.path` names.

    Raises:
        RequestError: the path is missing or is a file in no known format.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise RequestError(
            f"documents.path {path} does not exist. Name a file or a folder, or {EMBEDDED_HANDBOOK} or "
            f"{EMBEDDED_DOCUMENTS}, which come with the project."
        )
    if not root.is_dir() and root.suffix.lower() not in _READERS:
        raise RequestError(
            f"documents.path {path} is in no known format: documents are {', '.join(sorted(_READERS))} files."
        )
    return visible_files(root)


def _python_reference() -> tuple[list[Document], list[Quarantined]]:
    # typeshed has no types for pydoc's data module, so a plain import fails the type check.
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    source = "pydoc_data.topics:{}".format
    bare = {name: " ".join(text.partition("\n\n")[2].split()) for name, text in topics.items()}
    documents: list[Document] = []
    quarantine: list[Quarantined] = []
    for name, text in sorted(topics.items()):
        # Many topics are excerpts of longer ones. With both, the same text would be in training and test.
        whole = next((n for n in sorted(bare) if len(bare[n]) > len(bare[name]) and bare[name] in bare[n]), None)
        if whole is None:
            documents.append(_document(source(name), name, text))
        else:
            detail = f"its text is also in {source(whole)}"
            quarantine.append(_rejected("contained", source(name), "whole topic", detail))
    return documents, quarantine


def _document(source: str, title: str, text: str) -> Document:
    return Document(id=hashlib.sha256(text.encode()).hexdigest()[:16], source=source, title=title, text=text)


def _rejected(reason: str, source: Path | str, place: str, detail: str) -> Quarantined:
    return Quarantined(stage="document", reason=reason, source=str(source), place=place, detail=detail)


def _plain(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    return [_document(str(file), file.stem, file.read_text(encoding="utf-8-sig"))], []


def _html(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    soup = BeautifulSoup(file.read_text(encoding="utf-8-sig"), "html.parser")
    title = soup.title.get_text(strip=True) if soup.title else file.stem
    for element in soup(["script", "style", "nav", "header", "footer", "noscript", "template", "title"]):
        element.decompose()
    for heading in soup(["h1", "h2", "h3", "h4", "h5", "h6"]):
        # `cut_passages` takes such a line as the title of its section. Without it, the heading would begin a sentence.
        heading.replace_with(f"{'#' * int(heading.name[1])} {' '.join(heading.get_text(' ').split())}")
    return [_document(str(file), title, soup.get_text("\n", strip=True))], []


def _json(file: Path, field: str | None) -> tuple[list[Document], list[Quarantined]]:
    documents: list[Document] = []
    quarantine: list[Quarantined] = []
    for record in read_records(file):
        if isinstance(record, BrokenRecord):
            quarantine.append(record.quarantined("document"))
            continue
        value, place = record.value, record.place
        names = [field] if field else [name for name in TEXT_FIELDS if isinstance(value.get(name), str)]
        if len(names) > 1:
            raise RequestError(
                f"{file}, {place} has several text fields ({', '.join(names)}): choose one with documents.text_field."
            )
        text = value.get(names[0]) if names else None
        if not isinstance(text, str):
            expected = field or " or ".join(TEXT_FIELDS)
            detail = f"no text under {expected}; it has {', '.join(map(str, value)) or 'no key'}"
            quarantine.append(_rejected("no_text_field", file, place, detail))
            continue
        title = next((str(value[name]) for name in TITLE_FIELDS if value.get(name)), f"{file.stem} {place}")
        documents.append(_document(f"{file}:{place}", title, text))
    if not documents and not quarantine:
        raise RequestError(f"{file} is empty: there is no row in it.")
    return documents, quarantine


Reader = Callable[[Path, str | None], tuple[list[Document], list[Quarantined]]]
_READERS: dict[str, Reader] = {
    ".txt": _plain,
    ".md": _plain,
    ".markdown": _plain,
    ".rst": _plain,
    ".html": _html,
    ".htm": _html,
    ".json": _json,
    ".jsonl": _json,
}
