"""Reads documents: the embedded corpus, or a file or folder.

Formats with pages, slides, sections or cells have modules of their own; text, JSON and CSV files are read here.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from llm_engineering.data.reading.files import printable, text_encoding
from llm_engineering.data.reading.sources import visible_files
from llm_engineering.data.rows import Quarantined, is_blank, with_held_out_documents
from llm_engineering.documents.document import Document, UnreadableError, make_document, not_read
from llm_engineering.documents.notebook import read_notebook
from llm_engineering.documents.records import read_rows
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, EMBEDDED_HANDBOOK, DocumentsConfig, SplitConfig

logger = logging.getLogger(__name__)

# Reads the documents of a file. The text is `documents.text_field` of the recipe.
Reader = Callable[[Path, str | None], tuple[list[Document], list[Quarantined]]]

# Files and records that the warning about unread ones names. The data report has all of them.
_NAMED = 5
# How the names of files begin that Office keeps beside open documents.
_LOCK = "~$"
# Properties of a Markdown file in YAML, between lines of three dashes at its start.
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
# The embedded handbook: documents, the questions of its exam, and general questions.
HANDBOOK = Path(__file__).parent / "handbook"


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
        if file.name.startswith(_LOCK):
            quarantine.append(not_read("lock_file", file, "whole file", "Office keeps it while a document is open"))
            continue
        if reader is None:
            detail = f"documents are {', '.join(sorted(_READERS))}"
            quarantine.append(not_read("unknown_format", file, "whole file", detail))
            continue
        read, rejected = _read(reader, file, config.text_field)
        # Readers name a source by the path of its file, and add the place within it.
        read = [one.model_copy(update={"source": name + one.source.removeprefix(printable(str(file)))}) for one in read]
        documents += [document for document in read if not is_blank(document.text)]
        quarantine += rejected
        quarantine += [not_read("empty", file, d.source, "no text") for d in read if is_blank(d.text)]
    if not documents:
        problems = "; ".join(row.describe() for row in quarantine[:3]) or "the folder holds no file"
        raise RequestError(f"documents.path {config.path} holds no document that can be read: {problems}.")
    if quarantine:
        more = f"; and {len(quarantine) - _NAMED} more" if len(quarantine) > _NAMED else ""
        named = "; ".join(row.describe() for row in quarantine[:_NAMED])
        logger.warning("Not read, %d in all: %s%s", len(quarantine), named, more)
    return documents, quarantine


def _read(reader: Reader, file: Path, field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read a file. One that cannot be read is quarantined, so that the others are read.

    Raises:
        RequestError: the recipe does not say which of several texts to read.
    """
    if file.is_symlink() and not file.exists():
        detail = f"it is a link to {file.readlink()}, which does not exist"
        return [], [not_read("broken_link", file, "whole file", detail)]
    try:
        return reader(file, field)
    except RequestError:
        raise
    except UnreadableError as error:
        problem = not_read(error.reason, file, "whole file", error.detail)
    except UnicodeDecodeError as error:
        detail = f"its bytes are not {error.encoding} text: convert it, e.g. with iconv"
        problem = not_read("not_utf8", file, f"byte {error.start}", detail)
    except OSError as error:
        problem = not_read("unreadable", file, "whole file", str(error))
    except Exception as error:
        # The libraries that read these formats raise whatever the bytes of a damaged file lead to.
        logger.debug("%s cannot be read", file, exc_info=True)
        detail = f"{type(error).__name__}: {error}"[:200]
        problem = not_read("damaged", file, "whole file", f"{detail}; open it and save it again")
    return [], [problem]


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
    """The file, or the visible files in and below the folder, that a `documents.path` names, by their names as sources.

    A name is the path below that folder. The folder itself is not in it, because the name of a document decides its split:
    the split must not change when the folder is moved or renamed, or read by a job on another machine.

    Raises:
        RequestError: the path is missing or is a file in no known format.
    """
    if path == EMBEDDED_HANDBOOK:
        return {f"handbook/{file.name}": file for file in visible_files(HANDBOOK / "documents")}
    root = Path(path).expanduser()
    if not root.exists():
        raise RequestError(
            f"documents.path {path} does not exist. Name a file or a folder, or {EMBEDDED_HANDBOOK} or "
            f"{EMBEDDED_DOCUMENTS}, which come with the project."
        )
    if root.is_dir():
        return {printable(str(file.relative_to(root))): file for file in visible_files(root)}
    if root.suffix.lower() not in _READERS:
        raise RequestError(
            f"documents.path {path} is in no known format: documents are {', '.join(sorted(_READERS))} files."
        )
    return {printable(root.name): root}


def hold_out_documents(config: DocumentsConfig, split: SplitConfig) -> SplitConfig:
    """`with_held_out_documents` for the files of `documents.path`. Records of a file, such as rows of a CSV, are not counted.

    Raises:
        RequestError: the path is missing or is a file in no known format.
    """
    if config.path in (EMBEDDED_DOCUMENTS, EMBEDDED_HANDBOOK):
        return split
    files = [name for name, file in named_files(config.path).items() if file.suffix.lower() not in _WITH_RECORDS]
    raised = with_held_out_documents(split, files)
    if raised != split:
        logger.info(
            "data.split: test_fraction is %s instead of %s, and validation_fraction %s instead of %s, so that at least one of %d files "
            "is held out in each",
            raised.test_fraction,
            split.test_fraction,
            raised.validation_fraction,
            split.validation_fraction,
            len(files),
        )
    return raised


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
            documents.append(make_document(source(name), name, text))
        else:
            detail = f"its text is also in {source(whole)}"
            quarantine.append(not_read("contained", source(name), "whole topic", detail))
    return documents, quarantine


def _plain(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    return [make_document(str(file), file.stem, _decoded(file))], []


def _markdown(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read a text without its front matter, which can name the title. Text between two rules stays."""
    text = _decoded(file)
    if block := _FRONT_MATTER.match(text):
        try:
            properties = yaml.safe_load(block[1])
        except yaml.YAMLError:
            properties = None
        if isinstance(properties, dict) and not any(" " in str(name) for name in properties):
            return [make_document(str(file), str(properties.get("title") or file.stem), text[block.end() :])], []
    return [make_document(str(file), file.stem, text)], []


def _decoded(file: Path) -> str:
    content = file.read_bytes()
    text = content.decode(text_encoding(content[:4])).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _by_library(file: Path, field: str | None) -> tuple[list[Document], list[Quarantined]]:
    # The libraries of these formats take half a second to import, and are imported when there is such a file.
    from llm_engineering.documents import epub, markup, office, pdf

    readers: dict[str, Reader] = {
        ".html": markup.read_html,
        ".htm": markup.read_html,
        ".pdf": pdf.read_pdf,
        ".docx": office.read_docx,
        ".pptx": office.read_pptx,
        ".epub": epub.read_epub,
    }
    return readers[file.suffix.lower()](file, field)


# A record is a document of its own.
_WITH_RECORDS = (".csv", ".tsv", ".json", ".jsonl")
_READERS: dict[str, Reader] = {
    ".txt": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".rst": _plain,
    **dict.fromkeys((".html", ".htm", ".pdf", ".docx", ".pptx", ".epub"), _by_library),
    ".ipynb": read_notebook,
    **dict.fromkeys(_WITH_RECORDS, read_rows),
}
