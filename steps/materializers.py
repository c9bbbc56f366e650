"""Store artifacts: datasets as Arrow, adapters and reports as plain folders, everything else as JSON. Never a pickle."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, disable_caching, load_from_disk
from pydantic import BaseModel, ConfigDict
from zenml.artifact_stores import BaseArtifactStore
from zenml.enums import ArtifactType, VisualizationType
from zenml.materializers import PydanticMaterializer
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.utils import io_utils

from llm_engineering.errors import WorkError

__all__ = ["Directory", "DirectoryMaterializer", "HFDatasetMaterializer", "HashedPydanticMaterializer"]

# In the format of sha256sum, so that `sha256sum -c` can check it.
MANIFEST = "SHA256SUMS"
_READ_BYTES = 1 << 20


class Directory(BaseModel):
    """An artifact that is a folder of files: an adapter, or a report. The dashboard shows a report's HTML."""

    model_config = ConfigDict(frozen=True)

    path: Path

    def report(self) -> dict[str, Any]:
        """What the folder of a report says in JSON."""
        report: dict[str, Any] = json.loads((self.path / "report.json").read_text(encoding="utf-8"))
        return report


def is_lost(uri: str) -> bool:
    """Whether files of an artifact are missing. Remote stores are not asked, because that takes a request for each artifact."""
    if "://" in uri:
        return False
    folder = Path(uri)
    if not folder.is_dir():
        return True
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return not any(folder.iterdir())
    lines = manifest.read_text(encoding="utf-8").splitlines()
    return not all((folder / line.partition("  ")[2]).is_file() for line in lines)


def check_files(uri: str) -> None:
    """Raise a WorkError if files of an artifact are missing."""
    if is_lost(uri):
        raise WorkError(
            f"The files of an artifact are gone: {uri}. Restore this folder, or repeat the command that made it: a run makes lost "
            "results again."
        )


class HashedMaterializer(BaseMaterializer):
    """Base class that writes the hashes of an artifact's files to `SHA256SUMS` beside them.

    ZenML stores the hash of that file as the artifact's content hash, and uses it to find cached results.
    """

    SKIP_REGISTRATION: ClassVar[bool] = True

    def local_copy(self, files: str) -> str:
        """Copy a folder of a remote store to a temporary folder, which is deleted with the step or with this process."""
        with self.get_temporary_directory(delete_at_exit=False) as folder:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            io_utils.copy_dir(files, folder)
        return folder

    def compute_content_hash(self, data: Any) -> str:
        """Hash the stored files. ZenML calls this after it has written all files."""
        hashes = file_hashes(self.uri, self.artifact_store)
        manifest = "".join(f"{value}  {name}\n" for name, value in hashes.items())
        with self.artifact_store.open(os.path.join(self.uri, MANIFEST), "w") as file:
            file.write(manifest)
        return hashlib.sha256(manifest.encode()).hexdigest()


def file_hashes(uri: str, store: BaseArtifactStore) -> dict[str, str]:
    """SHA-256 of each file of an artifact by its path below `uri`, without the manifest."""
    hashes: dict[str, str] = {}
    for folder, _, names in store.walk(uri):
        for name in names:
            path = os.path.join(str(folder), str(name))
            relative = os.path.relpath(path, uri)
            if relative == MANIFEST:
                continue
            digest = hashlib.sha256()
            with store.open(path, "rb") as file:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
            hashes[relative] = digest.hexdigest()
    return dict(sorted(hashes.items()))


def _fingerprint_by_contents(state: Path) -> None:
    """Replace the fingerprint of a saved dataset by the hash of its files.

    `datasets` draws a new fingerprint for each dataset. Equal rows would then have different hashes, and the steps after
    them would run again.
    """
    content = json.loads(state.read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for file in content["_data_files"]:
        with (state.parent / file["filename"]).open("rb") as rows:
            digest.update(hashlib.file_digest(rows, "sha256").digest())
    content["_fingerprint"] = digest.hexdigest()[:16]
    state.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


class HashedPydanticMaterializer(HashedMaterializer, PydanticMaterializer):
    """ZenML's materializer for pydantic models, with hashes."""


def save_dataset(dataset: Dataset | DatasetDict, folder: str) -> None:
    """Write a dataset to a folder; an empty split gets one file."""
    shards: Any = (
        {name: None if len(part) else 1 for name, part in dataset.items()} if isinstance(dataset, DatasetDict) else 1
    )
    dataset.save_to_disk(folder, num_shards=shards)


class HFDatasetMaterializer(HashedMaterializer):
    """Stores datasets with hashes, in constant memory, and empty ones too.

    ZenML's own materializer copies a dataset to a temporary folder at each read, computes statistics of all values in memory,
    and imports torch and transformers. datasets 4.8 writes no file for an empty dataset, and then cannot read it.
    """

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Dataset, DatasetDict)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA_ANALYSIS

    def save(self, ds: Dataset | DatasetDict) -> None:
        """Write the dataset; an empty split gets one file."""
        with self.get_temporary_directory(delete_at_exit=True) as folder:
            save_dataset(ds, folder)
            for state in Path(folder).rglob("state.json"):
                _fingerprint_by_contents(state)
            io_utils.copy_dir(folder, self._files)

    def load(self, data_type: type[Any]) -> Dataset | DatasetDict:
        """Memory-map the dataset: in the store if it is local, otherwise in a temporary copy."""
        # `datasets` would write its cache files beside the dataset, which is inside the artifact.
        disable_caching()
        check_files(self.uri)
        if os.path.isdir(self._files):
            return load_from_disk(self._files)
        return load_from_disk(self.local_copy(self._files))

    def extract_metadata(self, ds: Dataset | DatasetDict) -> dict[str, Any]:
        """Number of rows of each split, and size in bytes."""
        parts = ds if isinstance(ds, DatasetDict) else {"rows": ds}
        return {
            "splits": {name: len(part) for name, part in parts.items()},
            "bytes": sum(part.data.nbytes for part in parts.values()),
        }

    @property
    def _files(self) -> str:
        return os.path.join(self.uri, "hf_datasets")


class DirectoryMaterializer(HashedMaterializer):
    """Copies a folder to the artifact store. A local store's copy is used in place."""

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Directory,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA

    def load(self, data_type: type[Any]) -> Directory:
        """The stored folder, or a temporary copy of it if the store is remote."""
        check_files(self.uri)
        if os.path.isdir(self._files):
            return Directory(path=Path(self._files))
        return Directory(path=Path(self.local_copy(self._files)))

    def save(self, data: Directory) -> None:
        """Copy the folder."""
        io_utils.copy_dir(str(data.path), self._files)

    def save_visualizations(self, data: Directory) -> dict[str, VisualizationType]:
        """The folder's HTML files."""
        return {
            os.path.join(self._files, page.name): VisualizationType.HTML for page in sorted(data.path.glob("*.html"))
        }

    def extract_metadata(self, data: Directory) -> dict[str, Any]:
        """Number of files, and size in bytes."""
        files = files_below(data.path)
        return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}

    @property
    def _files(self) -> str:
        return os.path.join(self.uri, "files")


def files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
