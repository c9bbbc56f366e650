"""The check of an artifact's files against their recorded hashes."""

import hashlib
from types import SimpleNamespace

from zenml.client import Client
from zenml.enums import StackComponentType

from tools.model_versions.provenance import changed_files


def test_files_in_the_store_of_another_stack_are_checked(tmp_path):
    store = Client().create_stack_component(
        "elsewhere", "local", StackComponentType.ARTIFACT_STORE, {"path": str(tmp_path)}
    )
    file = tmp_path / "rows"
    file.write_text("kept")
    manifest = f"{hashlib.sha256(b'kept').hexdigest()}  rows\n"
    (tmp_path / "SHA256SUMS").write_text(manifest)
    artifact = SimpleNamespace(
        artifact=SimpleNamespace(name="documents"),
        version="1",
        uri=str(tmp_path),
        content_hash=hashlib.sha256(manifest.encode()).hexdigest(),
        artifact_store_id=store.id,
    )
    assert list(changed_files(artifact)) == []
    file.write_text("lost")
    assert [(found.file, found.what) for found in changed_files(artifact)] == [("rows", "changed")]
