"""How artifacts are stored: datasets as Arrow, adapters and reports as plain directories. Never a pickle."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, disable_caching, load_from_disk
from pydantic import BaseModel, ConfigDict
from zenml.artifact_stores import BaseArtifactStore
from zenml.enums import ArtifactType, VisualizationType

# The integration calls itself unavailable, but its import registers the materializer; without it a dataset
# would be pickled.
from zenml.integrations.huggingface.materializers.huggingface_datasets_materializer import (
    DEFAULT_DATASET_DIR,
)
from zenml.integrations.huggingface.materializers.huggingface_datasets_materializer import (
    HFDatasetMaterializer as ZenMLDatasetMaterializer,
)
from zenml.materializers import PydanticMaterializer
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.utils import io_utils

__all__ = ["Directory", "DirectoryMaterializer", "HFDatasetMaterializer", "HashedPydanticMaterializer"]

# In the format of sha256sum, so that `sha256sum -c` checks it too.
MANIFEST = "SHA256SUMS"
_READ_BYTES = 1 << 20


class Directory(BaseModel):
    """A folder of files as an artifact: an adapter, or a report whose HTML the dashboard shows."""

    model_config = ConfigDict(frozen=True)

    path: Path


class HashedMaterializer(BaseMaterializer):
    """Writes the hashes of an artifact's files beside them, in `SHA256SUMS`.

    ZenML keeps the hash of that file, and takes it for the artifact's content where it looks for a cached result.
    """

    SKIP_REGISTRATION: ClassVar[bool] = True

    def local_copy(self, files: str) -> str:
        """A folder of a remote store in a temporary one, which goes with the step, or else with this process."""
        with self.get_temporary_directory(delete_at_exit=False) as folder:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            io_utils.copy_dir(files, folder)
        return folder

    def compute_content_hash(self, data: Any) -> str:
        """Hash what was stored: ZenML asks for it after all files are written."""
        hashes = file_hashes(self.uri, self.artifact_store)
        manifest = "".join(f"{value}  {name}\n" for name, value in hashes.items())
        with self.artifact_store.open(os.path.join(self.uri, MANIFEST), "w") as file:
            file.write(manifest)
        return hashlib.sha256(manifest.encode()).hexdigest()


def file_hashes(uri: str, store: BaseArtifactStore) -> dict[str, str]:
    """SHA-256 of every file of an artifact by its path below `uri`, but for the manifest."""
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


class HashedPydanticMaterializer(HashedMaterializer, PydanticMaterializer):
    """ZenML's, with hashes."""


class HFDatasetMaterializer(HashedMaterializer, ZenMLDatasetMaterializer):
    """ZenML's, without what grows with the rows or fails on none.

    By itself it copies a dataset to a temporary folder each time it is read and computes statistics of all its values
    in memory; and datasets 4.8 writes no file for an empty dataset, which it then cannot read.
    """

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Dataset, DatasetDict)

    def save(self, ds: Dataset | DatasetDict) -> None:
        """Write the dataset, with one file for what is empty."""
        shards: Any = (
            {name: None if len(part) else 1 for name, part in ds.items()} if isinstance(ds, DatasetDict) else 1
        )
        with self.get_temporary_directory(delete_at_exit=True) as folder:
            ds.save_to_disk(folder, num_shards=shards)
            io_utils.copy_dir(folder, self._files)

    def load(self, data_type: type[Any]) -> Dataset | DatasetDict:
        """The dataset, memory-mapped: in place from a local store, from a temporary copy otherwise."""
        # `datasets` keeps what it makes of a dataset beside it, which here would be inside the artifact.
        disable_caching()
        if os.path.isdir(self._files):
            return load_from_disk(self._files)
        return load_from_disk(self.local_copy(self._files))

    def extract_metadata(self, ds: Dataset | DatasetDict) -> dict[str, Any]:
        """Rows of each split, and bytes."""
        parts = ds if isinstance(ds, DatasetDict) else {"rows": ds}
        return {
            "splits": {name: len(part) for name, part in parts.items()},
            "bytes": sum(part.data.nbytes for part in parts.values()),
        }

    @property
    def _files(self) -> str:
        return os.path.join(self.uri, DEFAULT_DATASET_DIR)


class DirectoryMaterializer(HashedMaterializer):
    """Copies a folder into the artifact store as it is; from a local store it is used in place."""

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Directory,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA

    def load(self, data_type: type[Any]) -> Directory:
        """The stored folder, copied to a temporary one if the store is remote."""
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
        files = _files(data.path)
        return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}

    @property
    def _files(self) -> str:
        return os.path.join(self.uri, "files")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
