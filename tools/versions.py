"""What the tools for model versions share: finding one, its artifacts, and their origins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zenml.client import Client
from zenml.models import ArtifactVersionResponse, ModelVersionResponse, StepRunResponse
from zenml.utils.pagination_utils import depaginate

from llm_engineering.errors import RequestError, WorkError

# What a step of the evaluation is given to compare with: no model comes from it.
COMPARED_WITH = "incumbent"
# Artifacts that are read from the user's files.
SOURCED = ("documents", "instruction_candidates", "preference_candidates")


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
