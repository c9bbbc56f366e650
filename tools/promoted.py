"""Finds the model to hand over: the version asked for, or the one in production, else in staging."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from zenml.client import Client
from zenml.models import ModelVersionResponse

from llm_engineering.errors import RequestError
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.training_blocks import ModelConfig
from pipelines.registry import adapter_of, stages
from tools import versions


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


def find_model(recipe: Recipe, number: str | None) -> Found:
    """A version by its number; without one, the version in production, else in staging.

    Raises:
        RequestError: there is no such version, none is promoted, or it holds no trained model.
    """
    version = _promoted(recipe.name) if number is None else versions.find_version(recipe.name, number)
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
