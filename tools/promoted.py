"""Finds the promoted model in ZenML's Model Control Plane."""

from __future__ import annotations

from pathlib import Path

from zenml.client import Client
from zenml.enums import ModelStages
from zenml.models import ModelVersionResponse

from llm_engineering.config import ModelConfig, Recipe
from llm_engineering.errors import RequestError


def promoted_adapter(recipe: Recipe) -> tuple[str, Path, ModelConfig, str]:
    """The promoted adapter's name (`dpo` or `sft`), its folder, its base model, and a line that says which it is.

    Production comes before staging.

    Raises:
        RequestError: no version of this recipe's model is promoted.
    """
    for stage in (ModelStages.PRODUCTION, ModelStages.STAGING):
        version = _version(recipe.name, stage)
        if version is None:
            continue
        for name in ("dpo", "sft"):
            artifact = version.get_artifact(f"{name}_adapter")
            if artifact is not None:
                base = ModelConfig(
                    name_or_path=str(artifact.run_metadata["base_model"]),
                    revision=str(artifact.run_metadata["base_revision"]),
                    trust_remote_code=recipe.model.trust_remote_code,
                )
                described = (
                    f"{recipe.name} version {version.number} ({stage.value}): {name.upper()} on {base.name_or_path}"
                )
                return name, artifact.load().path, base, described
    raise RequestError(
        f"No version of {recipe.name} is promoted yet. `make run-sft` or `make run-dpo` promotes one that passes its gate."
    )


def _version(model: str, stage: ModelStages) -> ModelVersionResponse | None:
    try:
        return Client().get_model_version(model, stage)
    except KeyError:
        return None
