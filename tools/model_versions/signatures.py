"""The command `models sign`, and the check of signatures before a model is used or published.

A version has one signature over its adapters, its datasets and the statement of its lineage. Each merged model has a
signature of its own, because it leaves this machine alone. Both are artifacts of the version, so they are deleted with it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, VersionNumber, prepare_zenml

if TYPE_CHECKING:
    from llm_engineering.recipe.recipe import Recipe
    from llm_engineering.recipe.settings import Settings
    from tools.model_versions.versions import Found

logger = logging.getLogger("llm_engineering.signatures")

# The artifact with a signature, and its metadata that says what is signed: VERSION, or the id of a merged model.
SIGNATURES = "signatures"
SIGNS = "signs"
VERSION = "version"


def sign(version: VersionNumber, config: Config = DEFAULT_RECIPE, overrides: Overrides = None) -> int:
    """Sign the adapters, datasets, lineage and merged models of a model version.

    The key is LLM_SIGNING_KEY in the environment or in `.env`. With a key there, runs and merges sign what they make.

    Example: `llm-engineering models sign 3`
    """
    recipe = load_recipe(config, overrides or ())
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    if settings.llm_signing_key is None:
        raise RequestError(
            "No key is set to sign with. Set LLM_SIGNING_KEY to the path of a private key, or to keyless, in the "
            "environment or in .env."
        )
    prepare_zenml()
    from tools.model_versions.versions import find_version

    found = find_version(recipe.name, version)
    for part in parts_of(found):
        sign_part(found, part, settings)
    return 0


def sign_new(version: Any, settings: Settings) -> None:
    """Sign a version that a run has made, if a key is set. What is signed already stays as it is."""
    if settings.llm_signing_key is not None and VERSION not in signatures_of(version):
        sign_part(version, VERSION, settings)


def sign_part(version: Any, part: str, settings: Settings) -> None:
    """Sign a part of a version, and register the signature with the version.

    Raises:
        RequestError: the version has no model, the package for signatures is missing, or the key cannot be read.
        WorkError: files of the part differ from what the run recorded.
    """
    from zenml import save_artifact
    from zenml.model.utils import link_artifact_version_to_model_version

    from llm_engineering.publish import signing
    from steps.materializers import MANIFEST, Directory, DirectoryMaterializer
    from tools.model_versions.provenance import changed_files, lineage_of, name_of
    from tools.model_versions.versions import store_of

    name = f"{version.model.name} version {version.number}"
    lineage, subjects = lineage_of(version.model.name, version), {}
    signed = parts_of(version)[part]
    for place, artifact in signed.items():
        for finding in changed_files(artifact):
            raise WorkError(
                f"{name} is not signed, because {finding.where} is not as the run made it: {finding.file} ({finding.what}). "
                "`make verify` lists all differences."
            )
        with store_of(artifact).open(os.path.join(artifact.uri, MANIFEST), "r") as file:
            for line in file.read().splitlines():
                value, _, path = line.partition("  ")
                subjects[f"{place}/{path}" if place else path.removeprefix("files/")] = value
    with tempfile.TemporaryDirectory(prefix="signature-") as temporary:
        folder = Path(temporary)
        text = json.dumps(signing.statement(subjects, lineage), indent=2)
        (folder / signing.STATEMENT).write_text(text + "\n", encoding="utf-8")
        with _staged(version, signed, folder) as root:
            signing.sign(root, folder / signing.SIGNATURE, settings)
        saved = save_artifact(
            Directory(path=folder), SIGNATURES, materializer=DirectoryMaterializer, user_metadata={SIGNS: part}
        )
    link_artifact_version_to_model_version(saved, version)
    logger.info("Signed:      %s: %s", name, ", ".join(map(name_of, signed.values())))


def signed_model(found: Found, recipe: Recipe, settings: Settings) -> tuple[Path, dict[str, Path]]:
    """The folder of a version's merged model, whose signatures are verified, and the files of its signature by name.

    A merged model that this call makes of a verified version is signed, if a key is set.

    Raises:
        RequestError: it is not signed although it must be; and the errors of `merged_model`.
        WorkError: a signature is refused; and the errors of `merged_model`.
    """
    from llm_engineering.publish import signing
    from tools.model_versions.versions import merged_model

    signed = check_signature(found.version, VERSION, settings)
    is_verified = signed is not None and signing.can_verify(settings)
    before = parts_of(found.version)
    artifact = merged_model(found, recipe, settings)
    part = str(artifact.id)
    if part not in before and is_verified and settings.llm_signing_key is not None:
        sign_part(found.version, part, settings)
    folder: Path = artifact.load().path
    signature = check_signature(found.version, part, settings, folder)
    files = {} if signature is None else {name: signature / name for name in (signing.STATEMENT, signing.SIGNATURE)}
    return folder, files


def check_signature(version: Any, part: str, settings: Settings, merged: Path | None = None) -> Path | None:
    """Verify the signature of a part of a version; returns the folder of the signature, or None if there is none.

    Args:
        merged: the folder of the merged model, if it is loaded already.

    Raises:
        RequestError: the part is not signed or cannot be verified, and LLM_REQUIRE_SIGNATURE is set.
        WorkError: the signature is refused, or its files are lost.
    """
    from llm_engineering.publish import signing

    name = f"{version.model.name} version {version.number}"
    if part != VERSION:
        name = f"the merged model of {name}"
    artifact = signatures_of(version).get(part)
    folder: Path | None = None if artifact is None else artifact.load().path
    if folder is not None and signing.can_verify(settings):
        with _staged(version, parts_of(version)[part], folder, merged) as root:
            signing.verify(root, folder / signing.SIGNATURE, settings, name)
        logger.info("Signature:   verified, %s", name)
        return folder
    if folder is None:
        problem, remedy = "has no signature", f"Sign it: make sign VERSION={version.number}"
    else:
        problem = "is signed, but the signature was not verified"
        remedy = "Set LLM_SIGNING_PUBLIC_KEY to the key that signs"
    if settings.llm_require_signature:
        raise RequestError(f"{name[0].upper()}{name[1:]} {problem}, and LLM_REQUIRE_SIGNATURE is set. {remedy}.")
    logger.info("Signature:   %s %s. %s", name, problem, remedy)
    return folder


def signatures_of(version: Any) -> dict[str, Any]:
    """The newest signature of each signed part of a version."""
    from pipelines.repeats import linked_artifacts

    signatures = [artifact for artifact in linked_artifacts(version) if artifact.artifact.name == SIGNATURES]
    return {str(artifact.run_metadata[SIGNS]): artifact for artifact in signatures}


def parts_of(version: Any) -> dict[str, dict[str, Any]]:
    """The artifacts of each part that has a signature, by their folders in what is signed.

    Adapters and datasets are the origins of the last adapter. A repeat of the run may link other datasets to the version.

    Raises:
        RequestError: the version has no model.
    """
    from pipelines.repeats import linked_artifacts
    from steps.materializers import is_lost
    from tools.model_versions.versions import ADAPTER, MERGED, trained_adapter, with_origins

    made = {
        f"{artifact.artifact.name}-v{artifact.version}": artifact
        for artifact in with_origins([trained_adapter(version).artifact])
        if artifact.artifact.name.endswith((ADAPTER, "_dataset"))
    }
    merged = [artifact for artifact in linked_artifacts(version) if artifact.artifact.name == MERGED]
    return {VERSION: made, **{str(artifact.id): {"": artifact} for artifact in merged if not is_lost(artifact.uri)}}


@contextmanager
def _staged(version: Any, artifacts: Mapping[str, Any], statement: Path, merged: Path | None = None) -> Iterator[Path]:
    """A folder with the files of artifacts and the statement of lineage, as they are signed. Local files are links."""
    from zenml.utils import io_utils

    from llm_engineering.publish.signing import STATEMENT
    from steps.materializers import check_files

    with tempfile.TemporaryDirectory(prefix="signed-") as temporary:
        root = Path(temporary, f"{version.model.name}-{version.number}")
        for place, artifact in artifacts.items():
            check_files(artifact.uri)
            # A merged model is signed as it is exported: its files without a folder, and without SHA256SUMS.
            source = artifact.uri if place else str(merged or os.path.join(artifact.uri, "files"))
            if os.path.isdir(source):
                shutil.copytree(source, root / place, copy_function=os.symlink, dirs_exist_ok=True)
            else:
                io_utils.copy_dir(source, str(root / place))
        shutil.copy(statement / STATEMENT, root)
        yield root
