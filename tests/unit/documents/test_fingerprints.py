"""Hashes of the files that a run reads, and the differences between two sets of hashes."""

import hashlib

from llm_engineering.documents.fingerprints import dataset_fingerprints, document_fingerprints, fingerprint_table
from llm_engineering.documents.read import HANDBOOK
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, DocumentsConfig
from tools.model_versions.provenance import differing


def test_each_file_has_its_hash(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.md").write_text("b")
    (tmp_path / ".hidden").write_text("not read")
    found = document_fingerprints(DocumentsConfig(path=str(tmp_path)))
    assert found == {
        "a.txt": hashlib.sha256(b"a").hexdigest(),
        "below/b.md": hashlib.sha256(b"b").hexdigest(),
    }
    assert dataset_fingerprints([str(tmp_path / "a.txt"), None]) == {
        str(tmp_path / "a.txt"): hashlib.sha256(b"a").hexdigest()
    }
    assert {row["file"]: row["sha256"] for row in fingerprint_table(found)} == found


def test_the_embedded_corpus_has_one_hash():
    assert list(document_fingerprints(DocumentsConfig(path=EMBEDDED_DOCUMENTS))) == [EMBEDDED_DOCUMENTS]


def test_the_general_instructions_are_named_without_their_folder():
    found = dataset_fingerprints(["embedded:general"])
    assert found == {"embedded:general": hashlib.sha256((HANDBOOK / "general.jsonl").read_bytes()).hexdigest()}


def test_a_file_name_that_is_not_utf8_is_stored(tmp_path):
    name = b"bad-\xff.txt".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_text("a")
    found = document_fingerprints(DocumentsConfig(path=str(tmp_path)))
    assert [row["file"] for row in fingerprint_table(found)] == ["bad-\\udcff.txt"]


def test_changed_lost_and_added_files_are_named():
    then = {"same": "1", "changed": "1", "lost": "1"}
    now = {"same": "1", "changed": "2", "added": "1"}
    found = [(finding.file, finding.what) for finding in differing("here", then, now)]
    assert found == [("added", "added"), ("changed", "changed"), ("lost", "lost")]
