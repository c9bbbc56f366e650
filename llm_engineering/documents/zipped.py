"""Opens the zip archives in which DOCX, PPTX and EPUB files store their parts, and refuses those that would fill the memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

from llm_engineering.documents.document import UnreadableError

# The first bytes of the container of Word 97, PowerPoint 97, and of Office files with a password.
_OLE = bytes.fromhex("d0cf11e0a1b11ae1")
# Bits of a zip entry's flags: its content is encrypted.
_ENCRYPTED = 0x1
# The libraries hold the whole archive in memory, and its XML as a tree that takes about ten times its size. The XML of a
# book of 1,000 pages has some 20 MB.
MAX_UNPACKED = 1 << 30
MAX_MARKUP = 200 << 20
_MEDIA = frozenset([
    ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".emf", ".wmf", ".svg", ".webp", ".mp3", ".m4a", ".wav",
    ".mp4", ".m4v", ".mov", ".avi", ".wmv", ".bin", ".ttf", ".otf", ".woff", ".woff2", ".odttf", ".fntdata",
])  # fmt: skip


def open_zip(file: Path, kind: str) -> zipfile.ZipFile:
    """Open the archive of a document. Python reads no more of an entry than the size that was checked here.

    Args:
        kind: the format's name, for messages.

    Raises:
        UnreadableError: the file is no archive, is encrypted, or is too large when unpacked.
        OSError: the system refuses to read the file.
    """
    with file.open("rb") as stream:
        start = stream.read(len(_OLE))
    if start == _OLE:
        raise UnreadableError(
            "encrypted", f"it has a password, or an old format: open it and save it as {kind} without a password"
        )
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UnreadableError("damaged", f"it is no {kind} file ({error}): copy it again, or save it again") from error
    try:
        _check(archive, kind)
    except UnreadableError:
        archive.close()
        raise
    return archive


def _check(archive: zipfile.ZipFile, kind: str) -> None:
    entries = archive.infolist()
    if any(entry.flag_bits & _ENCRYPTED for entry in entries):
        raise UnreadableError("encrypted", f"it has a password: save it as {kind} without one")
    unpacked = sum(entry.file_size for entry in entries)
    markup = sum(entry.file_size for entry in entries if Path(entry.filename).suffix.lower() not in _MEDIA)
    for size, limit, what in ((unpacked, MAX_UNPACKED, "files"), (markup, MAX_MARKUP, "text and XML")):
        if size > limit:
            detail = f"unpacked, it has {size >> 20:,} MB of {what}, and the limit is {limit >> 20:,} MB: divide it"
            raise UnreadableError("too_large", detail)
