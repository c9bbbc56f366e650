"""The command `models delete`: deletes a version of a model, with everything that only this version uses."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, VersionNumber, prepare_zenml
from tools.terminal import console

if TYPE_CHECKING:
    from zenml.models import ArtifactVersionResponse, ModelVersionResponse

MB = 1e6


class Unused(NamedTuple):
    """What is deleted with a version, as nothing else uses it.

    Attributes:
        artifacts: the artifacts with their size in bytes.
        shared: number of artifacts that stay, because other versions use them.
    """

    artifacts: list[tuple[ArtifactVersionResponse, int]]
    shared: int

    @property
    def size(self) -> int:
        """The size of everything that is deleted, in bytes."""
        return sum(size for _, size in self.artifacts)


def delete(
    version: VersionNumber,
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> int:
    """Delete a model version and what only this version uses, after showing the disk that this frees.

    Artifacts that another version uses stay, and so do the records of the runs. A version is not deleted if it is in
    production or staging, if another version was trained from it, or while a run is in progress.

    Example: `llm-engineering models delete 3`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from tools.model_versions.versions import find_version

    found = find_version(recipe.name, version)
    others = [other for other in _all_versions() if other.id != found.id]
    _check(found, others)
    unused = _unused(found, others)
    name = f"{recipe.name} version {found.number}"
    _print(name, unused)
    if not yes and not _confirmed(f"Delete {name}?"):
        print("Nothing was deleted.")
        return 0
    try:
        recorded = _delete(found, unused)
    except OSError as error:
        raise WorkError(
            f"{name} was deleted in part: {error}. Make the file writable, then repeat the command to delete the rest."
        ) from error
    print(f"{name} is deleted, and {unused.size / MB:.1f} MB are free.")
    if recorded:
        print(
            f"ZenML's server still lists {recorded} artifacts, because recorded runs used them. Their files are deleted."
        )
    return 0


def _all_versions() -> list[ModelVersionResponse]:
    """The versions of every model: models share artifacts that came from the cache."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from tools.model_versions.versions import all_versions

    return [version for model in depaginate(Client().list_models) for version in all_versions(model.name)]


def _check(version: ModelVersionResponse, others: list[ModelVersionResponse]) -> None:
    """Check that a version may be deleted.

    Raises:
        RequestError: it is in production or staging, another version was trained from it, or a run is in progress.
    """
    from pipelines.registry import adapter_of, stages
    from tools.model_versions.versions import with_origins
    from tools.results import repair_killed, unfinished

    name = f"{version.model.name} version {version.number}"
    repair_killed()
    running = unfinished()
    if running:
        raise RequestError(
            f"Run {running[0].name} is in progress, and may use files of {name}. Repeat the command when the run has ended."
        )
    reasons = []
    state = stages(version.model.name)
    if state.production and state.production[-1].id == version.id:
        reasons.append("It is in production: first move another version there, with `make rollback` or `make promote`.")
    if state.staging is not None and state.staging.id == version.id:
        reasons.append("It is in staging: the next version that passes its gate takes its place there.")
    adapter = adapter_of(version)
    for other in others:
        theirs = adapter_of(other)
        if adapter is None or theirs is None or theirs.artifact.id == adapter.artifact.id:
            continue
        if adapter.artifact.id in {origin.id for origin in with_origins([theirs.artifact])}:
            trained = f"{other.model.name} version {other.number}"
            reasons.append(f"{trained} was trained from it, and its origin must stay: first delete {trained}.")
    if reasons:
        raise RequestError(f"{name} cannot be deleted. {' '.join(reasons)}")


def _unused(version: ModelVersionResponse, others: list[ModelVersionResponse]) -> Unused:
    """What only this version uses: its artifacts and their origins, without those of all other versions."""
    from pipelines.repeats import linked_artifacts
    from tools.model_versions.versions import with_origins

    own = list(with_origins([*linked_artifacts(version), *_made_for(version)]))
    kept = {
        artifact.id: artifact for artifact in with_origins([a for other in others for a in linked_artifacts(other)])
    }
    artifacts = [artifact for artifact in own if artifact.id not in kept]
    return Unused([(artifact, _size(artifact)) for artifact in artifacts], len(own) - len(artifacts))


def _made_for(version: ModelVersionResponse) -> list[ArtifactVersionResponse]:
    """The results of a version's runs. Those of a repeat of the version in production are not linked to the version."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    links = depaginate(Client().list_model_version_pipeline_run_links, model_version_id=version.id)
    runs = [Client().get_pipeline_run(link.pipeline_run.id) for link in links]
    steps = [step for run in runs for step in run.steps.values()]
    return [artifact for step in steps for outputs in step.outputs.values() for artifact in outputs]


def _size(artifact: ArtifactVersionResponse) -> int:
    """The size of an artifact's files in bytes; 0 if they are lost."""
    from tools.model_versions.versions import store_of

    store = store_of(artifact)
    files = (os.path.join(str(folder), str(name)) for folder, _, names in store.walk(artifact.uri) for name in names)
    return sum(store.size(file) or 0 for file in files)


def _print(name: str, unused: Unused) -> None:
    table = Table("What", "MB", title=f"Only {name} uses", title_justify="left")
    for artifact, size in sorted(unused.artifacts, key=lambda row: row[1], reverse=True):
        table.add_row(f"{artifact.artifact.name} v{artifact.version}", f"{size / MB:.1f}")
    console().print(table)
    print(
        f"Deleting it frees {unused.size / MB:.1f} MB. {unused.shared} artifacts stay, because other versions use them."
    )


def _confirmed(question: str) -> bool:
    """Ask on the terminal.

    Raises:
        RequestError: there is no terminal.
    """
    if not sys.stdin.isatty():
        raise RequestError(f"{question} There is no terminal to ask on. Add --yes (with make: ARGS=--yes).")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _delete(version: ModelVersionResponse, unused: Unused) -> int:
    """Delete the artifacts with their files, and the version last: the command can be repeated until then.

    Returns:
        The number of artifacts whose records a server keeps.
    """
    from zenml.client import Client

    from tools.model_versions.versions import producer, store_of

    client: Any = Client()
    for artifact, _ in unused.artifacts:
        step = producer(artifact)
        # A later run must not take this result from the cache.
        if step is not None and step.cache_expires_at is None:
            client.update_step_run(step.id, cache_expires_at=datetime.now(UTC).replace(tzinfo=None))
    recorded = 0
    for artifact, _ in unused.artifacts:
        store = store_of(artifact)
        if store.exists(artifact.uri):
            store.rmtree(artifact.uri)
        try:
            # Not the client's method, which refuses artifacts of recorded runs, as a server does.
            client.zen_store.delete_artifact_version(artifact.id)
        except ValueError:
            recorded += 1
    client.delete_model_version(version.id)
    return recorded
