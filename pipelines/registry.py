"""The stages of a model's versions: which one is in production, which one is in staging, and the history of changes.

Each change stores the whole state as a new version of one artifact, numbered from 1. ZenML accepts each number only once.
So if two processes change the same state, on one machine or on a server, one of them is refused; it reads the new state
and decides again. ZenML's own stages are set from this state. If a process ends before it sets them, the next change does.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from zenml import log_metadata, save_artifact
from zenml.client import Client
from zenml.enums import ArtifactSaveType, ModelStages
from zenml.exceptions import EntityExistsError
from zenml.models import ArtifactVersionResponse, ModelVersionResponse

from llm_engineering.errors import RequestError
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.stages import STAGES
from steps.materializers import HashedPydanticMaterializer

Action = Literal["stage", "promote", "rollback"]


class StaleError(Exception):
    """Production has changed since the model was judged."""


class StagedVersion(BaseModel):
    """A model version in a stage."""

    model_config = ConfigDict(frozen=True)

    number: int
    id: UUID


class Change(BaseModel):
    """A change of stages: which version moved, who moved it, when and why."""

    model_config = ConfigDict(frozen=True)

    action: Action
    version: int
    by: str
    at: datetime
    note: str


class Stages(BaseModel):
    """The versions in each stage after a change.

    Attributes:
        number: number of the change; 0 before the first change.
        production: versions in the order of their promotion. The last one is in production; a rollback removes it.
        change: the change that led to this state; None before the first change.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    production: list[StagedVersion]
    staging: StagedVersion | None
    change: Change | None


class Adapter(NamedTuple):
    """The last adapter of a model version.

    Attributes:
        name: the stage that trained it, `dpo` or `sft`.
    """

    name: str
    artifact: ArtifactVersionResponse
    base: ModelConfig

    @property
    def folder(self) -> Path:
        """The folder of the adapter: in the artifact store if it is local, else a temporary copy."""
        path: Path = self.artifact.load().path
        return path


class Incumbent(NamedTuple):
    """The model in production."""

    number: int
    adapter: Adapter


def incumbent(model: str) -> Incumbent | None:
    """The version in production, or None.

    Raises:
        RequestError: the version has no model that writes, because a person set its stage in ZenML.
    """
    production = stages(model).production
    if not production:
        return None
    version = Client().get_model_version(model, production[-1].id)
    adapter = adapter_of(version)
    if adapter is None or not STAGES[adapter.name].policy:
        has = "has no adapter" if adapter is None else "holds a reward model"
        raise RequestError(
            f"{model} version {version.number} is in production and {has}. Promote another version: "
            "make promote VERSION=…"
        )
    return Incumbent(version.number, adapter)


def adapter_of(version: ModelVersionResponse) -> Adapter | None:
    """The last adapter that the version's run trained, or None if it trained none."""
    for name in reversed(STAGES):
        artifact = version.get_artifact(f"{name}_adapter")
        if artifact is not None:
            facts = artifact.run_metadata
            base = ModelConfig(name_or_path=str(facts["base_model"]), revision=str(facts["base_revision"]))
            return Adapter(name, artifact, base)
    return None


def stages(model: str) -> Stages:
    """The state after the last change, without versions that were deleted since then."""
    try:
        Client().get_model(model)
    except KeyError:
        return Stages(number=0, production=[], staging=None, change=None)
    newest = _changes(model, size=1)
    if newest:
        state: Stages = newest[0].load()
        production, staging = state.production, state.staging
    else:
        state = Stages(number=0, production=[], staging=None, change=None)
        production = [_staged(version) for version in _in_zenml_stage(model, ModelStages.PRODUCTION)[:1]]
        staging = next((_staged(version) for version in _in_zenml_stage(model, ModelStages.STAGING)), None)
    return state.model_copy(
        update={
            "production": [version for version in production if _exists(version)],
            "staging": staging if staging is not None and _exists(staging) else None,
        }
    )


def history(model: str) -> list[Change]:
    """All changes, oldest first."""
    return [version.load().change for version in reversed(_changes(model, size=10_000))]


def move(version: ModelVersionResponse, stage: str, incumbent: int | None, by: str, note: str) -> Stages:
    """Move a version to `staging` or `production`. Nothing is recorded if it is in this stage already.

    Args:
        incumbent: the version that was in production when this one was judged; None if there was none.

    Raises:
        StaleError: another version, or none, is in production now.
    """
    staged = _staged(version)

    def moved(state: Stages) -> tuple[list[StagedVersion], StagedVersion | None]:
        now = state.production[-1].number if state.production else None
        if now != incumbent:
            raise StaleError(f"it was judged with {_named(incumbent)} in production, and now {_named(now)} is there")
        if stage == ModelStages.STAGING.value:
            return state.production, staged
        staging = None if state.staging == staged else state.staging
        return [*state.production, staged], staging

    action: Action = "stage" if stage == ModelStages.STAGING.value else "promote"
    return _change(version.model.name, action, moved, by, note)


def roll_back(model: str, by: str, note: str) -> Stages:
    """Put the former production version back.

    Raises:
        RequestError: there is no former production version.
    """

    def rolled_back(state: Stages) -> tuple[list[StagedVersion], StagedVersion | None]:
        if len(state.production) < 2:
            raise RequestError(
                f"There is no former production version of {model} to go back to"
                + (f": version {state.production[0].number} is the first." if state.production else ".")
                + " `make models` lists the versions."
            )
        return state.production[:-1], state.staging

    return _change(model, "rollback", rolled_back, by, note)


def person() -> str:
    """The user and the machine, as `user@host`."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id without a name.
        name = f"user {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _change(
    model: str,
    action: Action,
    update: Callable[[Stages], tuple[list[StagedVersion], StagedVersion | None]],
    by: str,
    note: str,
) -> Stages:
    """Store the state that `update` makes of the present one; repeat if another process was faster."""
    while True:
        state = stages(model)
        production, staging = update(state)
        if (production, staging) == (state.production, state.staging):
            return state
        moved = staging if action == "stage" else production[-1]
        assert moved is not None
        at = datetime.now(UTC)
        change = Change(action=action, version=moved.number, by=by, at=at, note=note)
        new = Stages(number=state.number + 1, production=production, staging=staging, change=change)
        try:
            save_artifact(
                new,
                _ledger(model),
                version=new.number,
                materializer=HashedPydanticMaterializer,
                # Otherwise ZenML would make it an output of the running step and link it to that step's model version.
                save_type=ArtifactSaveType.EXTERNAL,
            )
        except EntityExistsError:
            continue
        copy_stages_to_zenml(model)
        facts: dict[str, Any] = {"stage_change": action, "changed_by": by, "changed_at": at.isoformat(), "note": note}
        log_metadata(metadata=facts, model_version_id=moved.id)
        return new


def copy_stages_to_zenml(model: str) -> None:
    """Set ZenML's own stages from the state; repeat if another process has changed the state meanwhile."""
    while True:
        state = stages(model)
        wanted = {
            ModelStages.PRODUCTION: state.production[-1].id if state.production else None,
            ModelStages.STAGING: state.staging.id if state.staging else None,
        }
        for stage, version_id in wanted.items():
            for version in _in_zenml_stage(model, stage):
                if version.id not in wanted.values():
                    version.set_stage(ModelStages.ARCHIVED, force=True)
            if version_id is not None:
                Client().get_model_version(model, version_id).set_stage(stage, force=True)
        if stages(model).number == state.number:
            return


def _named(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"


def _staged(version: ModelVersionResponse) -> StagedVersion:
    return StagedVersion(number=version.number, id=version.id)


def _exists(version: StagedVersion) -> bool:
    try:
        Client().get_model_version(None, version.id, hydrate=False)
    except KeyError:
        return False
    return True


def _ledger(model: str) -> str:
    # With the model's id: a model that was deleted and created again has a new history.
    return f"{model}_stages_{Client().get_model(model).id.hex[:8]}"


def _changes(model: str, size: int) -> list[ArtifactVersionResponse]:
    page = Client().list_artifact_versions(
        artifact=_ledger(model), sort_by="desc:version_number", size=size, hydrate=True
    )
    return list(page.items)


def _in_zenml_stage(model: str, stage: ModelStages) -> list[ModelVersionResponse]:
    """The versions that ZenML lists in a stage; more than one if two processes have set it at the same time."""
    return list(Client().list_model_versions(model_name_or_id=model, stage=stage.value, size=100).items)
