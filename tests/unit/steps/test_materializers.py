"""Materializers: empty datasets, reading in place, and the hashes of the stored files."""

import hashlib
from datetime import datetime
from uuid import uuid4

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from zenml.artifact_stores import LocalArtifactStore, LocalArtifactStoreConfig
from zenml.enums import StackComponentType

from llm_engineering.errors import WorkError
from steps.materializers import (
    MANIFEST,
    Directory,
    DirectoryMaterializer,
    HashedPydanticMaterializer,
    HFDatasetMaterializer,
    check_files,
    file_hashes,
    is_lost,
)


def local_store(path) -> LocalArtifactStore:
    now = datetime.now()
    config, kind = LocalArtifactStoreConfig(path=str(path)), StackComponentType.ARTIFACT_STORE
    return LocalArtifactStore("", uuid4(), config, "local", kind, user=uuid4(), created=now, updated=now)


def test_empty_datasets_can_be_read_again(tmp_path):
    features = Features({"x": Value("string")})
    stored = DatasetDict(
        rows=Dataset.from_dict({"x": ["a", "b"]}, features=features),
        quarantine=Dataset.from_dict({"x": []}, features=features),
    )
    materializer = HFDatasetMaterializer(uri=str(tmp_path))
    materializer.save(stored)
    read = materializer.load(DatasetDict)
    assert read["rows"]["x"] == stored["rows"]["x"]
    assert len(read["quarantine"]) == 0
    assert read["quarantine"].features == features


def test_equal_rows_have_equal_hashes_and_other_rows_have_others(tmp_path):
    """So a step whose rows are the same as before does not run the steps after it again."""
    hashes = []
    for number, rows in enumerate((["a", "b"], ["a", "b"], ["a", "c"])):
        Dataset.from_dict({"x": rows}).save_to_disk(tmp_path / f"rows{number}")
        # A dataset that is read from a file has a fingerprint of its own.
        file = tmp_path / f"rows{number}" / "data-00000-of-00001.arrow"
        stored = DatasetDict(rows=Dataset.from_file(str(file)))
        materializer = HFDatasetMaterializer(uri=str(tmp_path / str(number)), artifact_store=local_store(tmp_path))
        (tmp_path / str(number)).mkdir()
        materializer.save(stored)
        hashes.append(materializer.compute_content_hash(stored))
        assert materializer.load(DatasetDict)["rows"]["x"] == rows
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_local_dataset_is_read_in_place(tmp_path):
    stored = DatasetDict(rows=Dataset.from_dict({"x": list(range(2000))}))
    materializer = HFDatasetMaterializer(uri=str(tmp_path))
    materializer.save(stored)
    read = materializer.load(DatasetDict)
    assert read["rows"].cache_files[0]["filename"].startswith(str(tmp_path))
    assert materializer.extract_metadata(read)["splits"] == {"rows": 2000}


@pytest.mark.parametrize("kind", ["directory", "dataset", "model"])
def test_hashes_of_the_stored_files_are_beside_them(tmp_path, kind):
    """The manifest has the format of sha256sum, and its hash is the artifact's content hash."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "deep" / "b.txt").write_text("b")
    materializer_class, value = {
        "directory": (DirectoryMaterializer, Directory(path=source)),
        "dataset": (HFDatasetMaterializer, DatasetDict(rows=Dataset.from_dict({"x": ["a"]}))),
        "model": (HashedPydanticMaterializer, Directory(path=source)),
    }[kind]
    uri = tmp_path / "stored"
    uri.mkdir()
    materializer = materializer_class(uri=str(uri), artifact_store=local_store(tmp_path))
    materializer.save(value)
    content = materializer.compute_content_hash(value)
    manifest = (uri / "SHA256SUMS").read_bytes()
    assert content == hashlib.sha256(manifest).hexdigest()
    listed = dict(reversed(line.split("  ")) for line in manifest.decode().splitlines())
    stored = [file for file in uri.rglob("*") if file.is_file() and file.name != "SHA256SUMS"]
    assert listed == {str(f.relative_to(uri)): hashlib.sha256(f.read_bytes()).hexdigest() for f in stored}
    assert listed == file_hashes(str(uri), materializer.artifact_store)


def test_reading_a_dataset_writes_nothing_to_the_artifact(tmp_path):
    materializer = HFDatasetMaterializer(uri=str(tmp_path), artifact_store=local_store(tmp_path))
    materializer.save(DatasetDict(rows=Dataset.from_dict({"x": [1, 2]})))
    before = file_hashes(str(tmp_path), materializer.artifact_store)
    read = materializer.load(DatasetDict)
    assert read["rows"].map(lambda row: {"y": row["x"] + 1})["y"][:] == [2, 3]
    assert file_hashes(str(tmp_path), materializer.artifact_store) == before


def test_an_artifact_without_its_files_is_named(tmp_path):
    folder = tmp_path / "sft_adapter"
    assert is_lost(str(folder))
    folder.mkdir()
    assert is_lost(str(folder))
    (folder / "weights").write_text("1")
    (folder / MANIFEST).write_text("00  weights\n")
    assert not is_lost(str(folder))
    (folder / MANIFEST).write_text("00  weights\n11  files/config.json\n")
    with pytest.raises(WorkError, match="The files of an artifact are gone: .*sft_adapter. Restore this folder"):
        check_files(str(folder))
    assert not is_lost("s3://bucket/sft_adapter")
