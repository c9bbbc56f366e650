"""The stages of a model's versions: which is in production, which waits in staging, and how that came about.

Each change is a new version of one artifact, numbered from 1, that holds the whole state. ZenML's store accepts a number
once: of two processes that change the same state, on one machine or on a server, one is refused, reads the new state and
decides anew. ZenML's own stages follow from it, and are set again by the next change if a process ended in between.
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
from llm_engineering.recipe.training_blocks import ModelConfig
from steps.materializers import HashedPydanticMaterializer

Action = Literal["stage", "promote", "rollback"]


class StaleError(Exception):
    """Production is no longer what a decision was taken against."""


class Held(BaseModel):
    """A model version that holds a stage."""

    model_config = ConfigDict(frozen=True)

    number: int
    id: UUID


class Change(BaseModel):
    """Who moved which version, when and why."""

    model_config = ConfigDict(frozen=True)

    action: Action
    version: int
    by: str
    at: datetime
    note: str


class Stages(BaseModel):
    """Who holds which stage after a change.

    Attributes:
        number: of the change; 0 before the first.
        production: versions in the order in which they came to production, the last one is there now. A rollback takes
            the last one off.
        change: what led here; None before the first change.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    production: list[Held]
    staging: Held | None
    change: Change | None


class Adapter(NamedTuple):
    """What a model version ended with: `name` is `dpo` or `sft`, `base` the model it was trained on."""

    name: str
    artifact: ArtifactVersionResponse
    base: ModelConfig

    @property
    def folder(self) -> Path:
        """The files, in place in a local store, else in a temporary copy."""
        path: Path = self.artifact.load().path
        return path


class Incumbent(NamedTuple):
    """The model in production."""

    number: int
    adapter: Adapter


def incumbent(model: str) -> Incumbent | None:
    """The version in production, or None.

    Raises:
        RequestError: its run ended before there was a model: its stage was set by hand.
    """
    production = stages(model).production
    if not production:
        return None
    version = Client().get_model_version(model, production[-1].id)
    adapter = adapter_of(version)
    if adapter is None:
        raise RequestError(
            f"{model} version {version.number} is in production and has no adapter. `make promote VERSION=…` puts another "
            "one there."
        )
    return Incumbent(version.number, adapter)


def adapter_of(version: ModelVersionResponse) -> Adapter | None:
    """The adapter that a run ended with, or None if it ended before."""
    for name in ("dpo", "sft"):
        artifact = version.get_artifact(f"{name}_adapter")
        if artifact is not None:
            facts = artifact.run_metadata
            base = ModelConfig(name_or_path=str(facts["base_model"]), revision=str(facts["base_revision"]))
            return Adapter(name, artifact, base)
    return None


def stages(model: str) -> Stages:
    """The state after the last change. Versions that were deleted since are left out."""
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
        production = [_held(version) for version in _holders(model, ModelStages.PRODUCTION)[:1]]
        staging = next((_held(version) for version in _holders(model, ModelStages.STAGING)), None)
    return state.model_copy(
        update={
            "production": [held for held in production if _exists(held)],
            "staging": staging if staging is not None and _exists(staging) else None,
        }
    )


def history(model: str) -> list[Change]:
    """All changes, the oldest first."""
    return [version.load().change for version in reversed(_changes(model, size=10_000))]


def move(version: ModelVersionResponse, stage: str, incumbent: int | None, by: str, note: str) -> Stages:
    """Move a version to `staging` or `production`.

    Args:
        incumbent: the version that was in production when this one was judged, None if there was none.

    Raises:
        StaleError: another version, or none, is in production by now.
    """
    held = _held(version)

    def moved(state: Stages) -> tuple[list[Held], Held | None]:
        now = state.production[-1].number if state.production else None
        if now != incumbent:
            raise StaleError(f"it was judged with {_named(incumbent)} in production, and by now {_named(now)} is there")
        if stage == ModelStages.STAGING.value:
            return state.production, held
        staging = None if state.staging == held else state.staging
        return [*state.production, held], staging

    action: Action = "stage" if stage == ModelStages.STAGING.value else "promote"
    return _change(version.model.name, action, moved, by, note)


def roll_back(model: str, by: str, note: str) -> Stages:
    """Put the former production version back.

    Raises:
        RequestError: there is none.
    """

    def former(state: Stages) -> tuple[list[Held], Held | None]:
        if len(state.production) < 2:
            raise RequestError(
                f"There is no former production version of {model} to go back to"
                + (f": version {state.production[0].number} is the first." if state.production else ".")
                + " `make models` lists the versions."
            )
        return state.production[:-1], state.staging

    return _change(model, "rollback", former, by, note)


def person() -> str:
    """The person at this machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        name = f"user {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _change(
    model: str, action: Action, update: Callable[[Stages], tuple[list[Held], Held | None]], by: str, note: str
) -> Stages:
    while True:
        state = stages(model)
        production, staging = update(state)
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
                # Else it would be an output of the step that runs, and belong to its model version.
                save_type=ArtifactSaveType.EXTERNAL,
            )
        except EntityExistsError:
            continue
        _settle(model)
        facts: dict[str, Any] = {"stage_change": action, "changed_by": by, "changed_at": at.isoformat(), "note": note}
        log_metadata(metadata=facts, model_version_id=moved.id)
        return new


def _settle(model: str) -> None:
    """Give ZenML's stages to the versions that hold them; until no other process changed them meanwhile."""
    while True:
        state = stages(model)
        holders = {
            ModelStages.PRODUCTION: state.production[-1].id if state.production else None,
            ModelStages.STAGING: state.staging.id if state.staging else None,
        }
        for stage, holder in holders.items():
            for version in _holders(model, stage):
                if version.id not in holders.values():
                    version.set_stage(ModelStages.ARCHIVED, force=True)
            if holder is not None:
                Client().get_model_version(model, holder).set_stage(stage, force=True)
        if stages(model).number == state.number:
            return


def _named(number: int | None) -> str:
    return "nothing" if number is None else f"version {number}"


def _held(version: ModelVersionResponse) -> Held:
    return Held(number=version.number, id=version.id)


def _exists(held: Held) -> bool:
    try:
        Client().get_model_version(None, held.id, hydrate=False)
    except KeyError:
        return False
    return True


def _ledger(model: str) -> str:
    # A model that is deleted and made anew is another one.
    return f"{model}_stages_{Client().get_model(model).id.hex[:8]}"


def _changes(model: str, size: int) -> list[ArtifactVersionResponse]:
    found = Client().list_artifact_versions(
        artifact=_ledger(model), sort_by="desc:version_number", size=size, hydrate=True
    )
    return list(found.items)


def _holders(model: str, stage: ModelStages) -> list[ModelVersionResponse]:
    """The versions that ZenML has in a stage: more than one if two processes set it at once."""
    return list(Client().list_model_versions(model_name_or_id=model, stage=stage.value, size=100).items)
