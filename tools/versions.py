"""Finds versions of a model, their artifacts and origins, and the merged model of a version.

ZenML is imported at the top: commands import this module inside their functions.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from zenml import save_artifact
from zenml.client import Client
from zenml.model.utils import link_artifact_version_to_model_version
from zenml.models import ArtifactVersionResponse, ModelVersionResponse, StepRunResponse
from zenml.utils.pagination_utils import depaginate

from llm_engineering.data.storage import stream_records
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.device import choose_device
from llm_engineering.publish.merge import MAX_ROWS, Trained, merge, merged_device
from llm_engineering.publish.verification import HeldoutRow, Verification, precision
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import ModelConfig
from pipelines.registry import adapter_of, stages
from steps.materializers import Directory, DirectoryMaterializer

logger = logging.getLogger("llm_engineering.versions")

# What a step of the evaluation is given to compare with: no model comes from it.
COMPARED_WITH = "incumbent"
# Artifacts that are read from the user's files.
SOURCED = ("documents", "instruction_candidates", "preference_candidates")
MERGED = "merged_model"


class Found(NamedTuple):
    """A version of a model.

    Attributes:
        name: what it ends with, `dpo` or `sft`.
        folders: of all that was trained on the way, `sft` and perhaps `dpo`: adapters, or full models.
        base: the model they were trained on.
    """

    version: ModelVersionResponse
    name: str
    folders: dict[str, Path]
    base: ModelConfig

    @property
    def described(self) -> str:
        """A line that says which it is."""
        stage = f" ({self.version.stage})" if self.version.stage else ""
        model = f"{self.version.model.name} version {self.version.number}{stage}"
        return f"{model}: {self.name.upper()} on {self.base.name_or_path}"


def all_versions(model: str) -> list[ModelVersionResponse]:
    """All versions of a model, the newest first."""
    try:
        model_id = Client().get_model(model).id
    except KeyError:
        return []
    found = depaginate(Client().list_model_versions, model_name_or_id=model_id, sort_by="desc:number", hydrate=True)
    return list(found)


def find_version(model: str, number: str) -> ModelVersionResponse:
    """A version by its number.

    Raises:
        RequestError: there is none of this number.
    """
    versions = all_versions(model)
    for version in versions:
        if str(version.number) == number.strip():
            return version
    known = ", ".join(str(version.number) for version in versions)
    there = f"There are {known}" if known else "There is none yet: `make run-sft` makes the first one"
    asked = f"There is no version {number} of {model}" if number.strip() else "No version is named, e.g. VERSION=1"
    raise RequestError(f"{asked}. {there}. `make models` lists them.")


def linked_artifacts(version: ModelVersionResponse) -> list[ArtifactVersionResponse]:
    """Every artifact of the run that made a version, new or from the cache, by name."""
    links = depaginate(Client().list_model_version_artifact_links, model_version_id=version.id, hydrate=True)
    found = {link.artifact_version.id: link.artifact_version for link in links}
    return sorted(found.values(), key=lambda artifact: (artifact.artifact.name, int(artifact.version)))


def newest_artifacts(version: ModelVersionResponse) -> dict[str, ArtifactVersionResponse]:
    """The artifacts of a version by name; of two reports on data or training, the later one."""
    return {artifact.artifact.name: artifact for artifact in linked_artifacts(version)}


def with_origins(artifacts: list[ArtifactVersionResponse]) -> Iterator[ArtifactVersionResponse]:
    """Artifacts, then what the steps that made them were given, back to the documents; each once.

    The model in production, which an evaluation compares with, has its own origins: other data, as it was then.
    """
    seen: set[Any] = set()
    queue = list(artifacts)
    while queue:
        artifact = queue.pop(0)
        if artifact.id in seen:
            continue
        seen.add(artifact.id)
        yield artifact
        step = producer(artifact)
        if step is not None:
            queue += [g for name, versions in step.inputs.items() if name != COMPARED_WITH for g in versions]


def producer(artifact: ArtifactVersionResponse) -> StepRunResponse | None:
    """The step that made an artifact."""
    if artifact.producer_step_run_id is None:
        return None
    return Client().get_run_step(artifact.producer_step_run_id)


def sources_of(artifact: ArtifactVersionResponse) -> dict[str, str]:
    """The hashes of the files that an artifact was read from, as they were recorded; empty for what has none.

    Raises:
        WorkError: the artifact cannot be read.
    """
    if artifact.artifact.name not in SOURCED:
        return {}
    try:
        sources = artifact.load().get("sources", [])
    except (OSError, ValueError) as error:
        raise WorkError(f"{artifact.artifact.name} version {artifact.version} cannot be read: {error}.") from error
    return {row["file"]: row["sha256"] for row in sources}


def find_model(recipe: Recipe, number: str | None) -> Found:
    """A version by its number; without one, the version in production, else in staging.

    Raises:
        RequestError: there is no such version, none is promoted, or it holds no trained model.
    """
    version = _promoted(recipe.name) if number is None else find_version(recipe.name, number)
    newest = adapter_of(version)
    if newest is None:
        raise RequestError(
            f"Version {version.number} of {recipe.name} holds no trained model: its run ended before that. "
            "`make runs` lists the runs."
        )
    adapters = {name: version.get_artifact(f"{name}_adapter") for name in ("sft", "dpo")}
    folders = {name: adapter.load().path for name, adapter in adapters.items() if adapter is not None}
    base = newest.base.model_copy(update={"trust_remote_code": recipe.model.trust_remote_code})
    return Found(version, newest.name, folders, base)


def _promoted(model: str) -> ModelVersionResponse:
    state = stages(model)
    held = state.production[-1] if state.production else state.staging
    if held is None:
        raise RequestError(
            f"No version of {model} is promoted yet. `make run-sft` or `make run-dpo` promotes one that passes its "
            "gate; `make models` lists all versions, and VERSION=… names one."
        )
    return Client().get_model_version(model, held.id)


def merged_model(found: Found, recipe: Recipe, settings: Settings) -> Path:
    """The folder of the merged model in the precision of `merged_device`.

    It is made once for each precision and repetition penalty, and registered as `merged_model` of the model version.

    Raises:
        RequestError: the version holds no held-out rows to verify it on.
        WorkError: the merged model differs from the trained one: it is then not registered.
    """
    dtype = merged_device(recipe.compute.here).dtype
    penalty = recipe.evaluation.repetition_penalty
    registered = _registered(found, precision(dtype), penalty)
    if registered is not None:
        return registered
    formatted = found.version.get_artifact("formatted_sft")
    if formatted is None:
        raise RequestError(
            f"Version {found.version.number} holds no held-out rows (formatted_sft), so there is nothing to verify it on."
        )
    records = islice(stream_records(formatted.load()["test"]), MAX_ROWS)
    rows = [HeldoutRow(record["id"], record["input_ids"], record["labels"]) for record in records]
    trained = Trained(found.base, found.folders[found.name])
    with tempfile.TemporaryDirectory(prefix="merged-") as temporary:
        target = Path(temporary, "model")
        verification = merge(trained, rows, choose_device(recipe.compute.here), dtype, settings, target, penalty)
        logger.info("Verified: %s", verification.sentence)
        return _register(found, target, verification, penalty)


def _registered(found: Found, dtype: str, repetition_penalty: float) -> Path | None:
    known = Client().list_artifact_versions(
        artifact=MERGED,
        model_version_id=found.version.id,
        run_metadata=[f"dtype:{dtype}", f"repetition_penalty:{repetition_penalty}"],
        sort_by="desc:created",
        size=1,
        hydrate=True,
    )
    if not known.items:
        return None
    folder: Path = known.items[0].load().path
    return folder


def _register(found: Found, folder: Path, verification: Verification, repetition_penalty: float) -> Path:
    facts = {
        **verification.model_dump(exclude_none=True),
        "stage": found.name,
        "repetition_penalty": repetition_penalty,
    }
    saved = save_artifact(Directory(path=folder), MERGED, materializer=DirectoryMaterializer, user_metadata=facts)
    link_artifact_version_to_model_version(saved, found.version)
    logger.info("Registered:  %s version %s", MERGED, saved.version)
    path: Path = saved.load().path
    return path


def copy_model(folder: Path, output: Path) -> None:
    """Copy the files of a model to a folder of the user's.

    Raises:
        RequestError: the folder cannot be written.
    """
    try:
        shutil.copytree(folder, output, dirs_exist_ok=True)
    except OSError as error:
        raise RequestError(f"OUTPUT {output} cannot be written: {error.strerror or error}.") from error
