"""Model versions of runs that made no new model: such a run belongs to the earlier version that has its model."""

from __future__ import annotations

from datetime import datetime

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.model.utils import link_artifact_version_to_model_version
from zenml.models import (
    ArtifactVersionResponse,
    ModelVersionPipelineRunRequest,
    ModelVersionResponse,
    PipelineRunResponse,
)
from zenml.utils.pagination_utils import depaginate

from pipelines.registry import adapter_of, stages


def linked_artifacts(version: ModelVersionResponse) -> list[ArtifactVersionResponse]:
    """All artifacts of the runs of a version, new or from the cache, sorted by name."""
    links = depaginate(Client().list_model_version_artifact_links, model_version_id=version.id, hydrate=True)
    found = {link.artifact_version.id: link.artifact_version for link in links}
    return sorted(found.values(), key=lambda artifact: (artifact.artifact.name, int(artifact.version)))


def version_of(run: PipelineRunResponse) -> ModelVersionResponse | None:
    """The model version of a run: its own, or the earlier one that has its model. None if it has neither."""
    if run.model_version is not None:
        return run.model_version
    links = Client().list_model_version_pipeline_run_links(pipeline_run_id=run.id, size=1).items
    return Client().get_model_version(None, links[0].model_version) if links else None


def last_used(version: ModelVersionResponse) -> datetime:
    """When the last run of a version began, also of those that repeated it."""
    links = Client().list_model_version_pipeline_run_links(model_version_id=version.id, sort_by="desc:created", size=1)
    return links.items[0].created if links.items else version.created


def earlier_version(own: ModelVersionResponse) -> ModelVersionResponse | None:
    """The first version of the same model that has the model of `own`, as all training came from the cache.

    Without a trained model, it is the first version that has all artifacts of `own`. None if there is no such version.
    """
    adapter = adapter_of(own)
    needed = {adapter.artifact.id} if adapter else {artifact.id for artifact in linked_artifacts(own)}
    if not needed:
        return None
    links = depaginate(Client().list_model_version_artifact_links, artifact_version_id=next(iter(needed)))
    for version in sorted(
        (Client().get_model_version(None, link.model_version) for link in links), key=lambda version: version.number
    ):
        if version.model.id != own.model.id or version.number >= own.number:
            continue
        if adapter is not None:
            # A version of a later stage has the adapters of the stages before it too.
            theirs = adapter_of(version)
            if theirs is not None and theirs.artifact.id == adapter.artifact.id:
                return version
        elif needed <= {artifact.id for artifact in linked_artifacts(version)}:
            return version
    return None


def in_production(version: ModelVersionResponse, incumbent: int | None) -> bool:
    """Whether a version is in production, or was when the run began that has `incumbent`.

    It keeps the measures and the decision that it was promoted with: a repeat was compared with itself.
    """
    production = stages(version.model.name).production
    return version.number in (incumbent, production[-1].number if production else None)


def drop_repeated_version(run: PipelineRunResponse) -> None:
    """Delete the model version of a run that has ended, if it is empty or an earlier version has its model.

    The run, and what it has measured, then belong to the earlier version. The artifacts of the run stay.
    """
    own = run.model_version
    if own is None:
        return
    if run.status != ExecutionStatus.COMPLETED and adapter_of(own) is None:
        Client().delete_model_version(own.id)
        return
    earlier = earlier_version(own)
    if earlier is None:
        return
    decision = own.get_artifact("promotion_decision")
    if decision is not None and not in_production(earlier, decision.load().incumbent):
        for artifact in linked_artifacts(own):
            link_artifact_version_to_model_version(artifact, earlier)
    Client().zen_store.create_model_version_pipeline_run_link(
        ModelVersionPipelineRunRequest(model_version=earlier.id, pipeline_run=run.id)
    )
    Client().delete_model_version(own.id)
