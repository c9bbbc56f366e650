"""Hashes of the single files that a run reads, so that `make verify` can name a changed file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Features, Value

from llm_engineering.data.reading.files import printable
from llm_engineering.data.reading.sources import dataset_files, dataset_hash
from llm_engineering.data.storage import to_dataset
from llm_engineering.documents.general_instructions import EMBEDDED_FILE
from llm_engineering.documents.read import documents_hash, named_files
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, EMBEDDED_GENERAL, DocumentsConfig
from llm_engineering.recipe.recipe import Recipe

_FEATURES = Features({"file": Value("string"), "sha256": Value("string")})


def document_fingerprints(config: DocumentsConfig) -> dict[str, str]:
    """SHA-256 of every file of `documents.path`; one hash of the whole for the embedded corpus."""
    if config.path == EMBEDDED_DOCUMENTS:
        return {config.path: documents_hash(config)}
    return _fingerprints(named_files(config.path))


def dataset_fingerprints(references: Sequence[str | None]) -> dict[str, str]:
    """SHA-256 of every file of the datasets; the commit for a dataset of the hub. None entries are skipped.

    Raises:
        RequestError: a dataset is missing.
    """
    found: dict[str, str] = {}
    for reference in filter(None, references):
        if reference == EMBEDDED_GENERAL:
            found |= _fingerprints({reference: EMBEDDED_FILE})
            continue
        files = dataset_files(reference)
        found |= (
            {reference: dataset_hash(reference)}
            if files is None
            else _fingerprints({str(file): file for file in files})
        )
    return found


def recipe_fingerprints(recipe: Recipe, artifact: str) -> dict[str, str]:
    """Present hashes of the sources of `documents`, or of the candidates of a kind of rows.

    Raises:
        RequestError: a source is missing.
    """
    data = recipe.data
    if artifact == "documents":
        return document_fingerprints(recipe.documents)
    if artifact == "text_candidates":
        return dataset_fingerprints([data.replay.path if data.replay is not None else None])
    kind = artifact.removesuffix("_candidates")
    general = data.replay_instructions if kind == "instruction" else None
    return dataset_fingerprints([data.file(kind), data.test_file(kind), general])


def fingerprint_table(fingerprints: dict[str, str]) -> Dataset:
    """Make a dataset of fingerprints, to store beside the rows that were read from the files."""
    return to_dataset([{"file": file, "sha256": value} for file, value in fingerprints.items()], _FEATURES)


def _fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source, file in files.items():
        # A file name may contain bytes that are not UTF-8, which Arrow cannot store.
        name = printable(source)
        try:
            with file.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            # The file is in the quarantine too. If it becomes readable later, its fingerprint changes.
            found[name] = f"unreadable: {error.strerror}"
    return found
