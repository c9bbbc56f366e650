"""Finds versions of a model, their artifacts and origins, and the merged model of a version.

This module imports ZenML at the top, so commands import this module inside their functions.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from zenml import save_artifact
from zenml.artifact_stores import BaseArtifactStore
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.model.utils import link_artifact_version_to_model_version
from zenml.models import ArtifactVersionResponse, ModelVersionResponse, StepRunResponse
from zenml.stack.stack_component import StackComponent
from zenml.utils.pagination_utils import depaginate

from llm_engineering.data.storage import stream_records
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.device import choose_device
from llm_engineering.models.new_tokens import with_added_tokens
from llm_engineering.models.revision import check_unchanged
from llm_engineering.publish.merge import MAX_ROWS, Trained, merge, merged_device
from llm_engineering.publish.verification import HeldoutRow, Verification, precision
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from pipelines.registry import Adapter, adapter_of, stages
from pipelines.repeats import linked_artifacts
from steps.materializers import Directory, DirectoryMaterializer
from tools.zenml_store import newest_stored

logger = logging.getLogger("llm_engineering.versions")

# Name of the input with the model in production. The evaluation only compares with it, so it is not an origin of the
# version.
COMPARED_WITH = "incumbent"
# The kinds of rows with which a merged model is compared with the trained one, in the order of preference.
_VERIFIED_WITH = ("instruction", "text", "prompt")
# The end of the names of adapters, after the stage.
ADAPTER = "_adapter"
# Metadata of an adapter: the hashes of the files with rewards of the user's own.
REWARD_CODE = "reward_code"
# Artifacts that are made from the user's files.
SOURCED = (
    "documents",
    "text_candidates",
    "instruction_candidates",
    "preference_candidates",
    "labelled_candidates",
    "prompt_candidates",
)
MERGED = "merged_model"


class Found(NamedTuple):
    """A version of a model.

    Attributes:
        name: its last training stage, `dpo` or `sft`.
        folders: the adapter or full model of each stage that makes a model that writes, `sft` and perhaps `dpo`.
    """

    version: ModelVersionResponse
    name: str
    folders: dict[str, Path]
    base: ModelConfig

    @property
    def described(self) -> str:
        """Model, version, stage and base model as one line."""
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
        RequestError: no version has this number.
    """
    versions = all_versions(model)
    for version in versions:
        if str(version.number) == number.strip():
            return version
    known = ", ".join(str(version.number) for version in versions)
    existing = f"Existing versions: {known}" if known else "Create the first version: `make run-sft`"
    problem = (
        f"There is no version {number} of {model}" if number.strip() else "VERSION is missing, for example VERSION=1"
    )
    raise RequestError(f"{problem}. {existing}. `make models` lists all versions.")


def trained_adapter(version: ModelVersionResponse) -> Adapter:
    """The last adapter that the version's run trained.

    Raises:
        RequestError: it trained none.
    """
    adapter = adapter_of(version)
    if adapter is None:
        raise RequestError(
            f"{version.model.name} version {version.number} has no model, because its run ended before training was complete. "
            "Choose another version: `make models` lists all versions."
        )
    return adapter


def newest_artifacts(version: ModelVersionResponse) -> dict[str, ArtifactVersionResponse]:
    """The artifacts of a version by name. If two have the same name (reports on data or training), the later one."""
    return {artifact.artifact.name: artifact for artifact in linked_artifacts(version)}


def with_origins(artifacts: list[ArtifactVersionResponse]) -> Iterator[ArtifactVersionResponse]:
    """Yield the artifacts, then the inputs of the steps that made them, and so on back to the documents; each once.

    The model in production, which an evaluation compares with, is left out. It was trained on other data.
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
    """The step that made an artifact, or None if it was saved without a step."""
    if artifact.producer_step_run_id is None:
        return None
    return Client().get_run_step(artifact.producer_step_run_id)


def store_of(artifact: ArtifactVersionResponse) -> BaseArtifactStore:
    """The store that holds an artifact's files. The active stack may have another one, which refuses to read them."""
    model = Client().get_stack_component(StackComponentType.ARTIFACT_STORE, artifact.artifact_store_id)
    store = StackComponent.from_model(model)
    assert isinstance(store, BaseArtifactStore)
    return store


def sources_of(artifact: ArtifactVersionResponse) -> dict[str, str]:
    """The recorded hashes of the files that an artifact was read from, by file; empty if it was not read from files.

    Raises:
        WorkError: the artifact's files are damaged or missing.
    """
    if artifact.artifact.name.endswith(ADAPTER):
        return dict(cast("dict[str, str]", artifact.run_metadata.get(REWARD_CODE, {})))
    if artifact.artifact.name not in SOURCED:
        return {}
    try:
        sources = artifact.load().get("sources", [])
    except (OSError, ValueError) as error:
        raise WorkError(
            f"{artifact.artifact.name} version {artifact.version} cannot be read: {error}. `make verify` lists damaged files."
        ) from error
    return {row["file"]: row["sha256"] for row in sources}


def find_model(recipe: Recipe, number: str | None) -> Found:
    """A version by its number; without a number, the version in production, or else in staging.

    Raises:
        RequestError: the version does not exist, no version is promoted, or the version has no trained model, or holds a
            reward model.
    """
    version = _promoted(recipe.name) if number is None else find_version(recipe.name, number)
    newest = trained_adapter(version)
    if not STAGES[newest.name].policy:
        raise RequestError(
            f"Version {version.number} of {recipe.name} holds a reward model, which scores answers and writes none. Choose another "
            "version: `make models` lists all versions."
        )
    adapters = {name: version.get_artifact(f"{name}_adapter") for name, stage in STAGES.items() if stage.policy}
    folders = {name: adapter.load().path for name, adapter in adapters.items() if adapter is not None}
    base = newest.base.model_copy(update={"trust_remote_code": recipe.model.trust_remote_code})
    return Found(version, newest.name, folders, with_added_tokens(base, folders[newest.name]))


def find_reward_model(model: str, number: str, trust_remote_code: bool) -> tuple[ModelConfig, Path]:
    """A reward model: the base model of its training, and its folder.

    Args:
        model: the name of the recipe, if `number` does not name another one.
        number: a version, as `3`, or as `other-recipe:3`.

    Raises:
        RequestError: the version does not exist, has no reward model, or its base model has changed.
    """
    artifact = reward_model_artifact(model, number)
    facts = artifact.run_metadata
    base = ModelConfig(
        name_or_path=str(facts["base_model"]),
        revision=str(facts["base_revision"]),
        trust_remote_code=trust_remote_code,
    )
    folder: Path = artifact.load().path
    base = with_added_tokens(base, folder)
    check_unchanged(base)
    return base, folder


def reward_model_artifact(model: str, number: str) -> ArtifactVersionResponse:
    """The artifact of a reward model; the arguments are those of `find_reward_model`.

    Raises:
        RequestError: the version does not exist, or has no reward model.
    """
    named, _, number = number.rpartition(":")
    version = find_version(named or model, number)
    artifact = next(
        (
            found
            for name, stage in STAGES.items()
            if not stage.policy and (found := version.get_artifact(f"{name}_adapter"))
        ),
        None,
    )
    if artifact is None:
        raise RequestError(
            f"Version {number} of {named or model} has no reward model. Train one with a recipe whose chain has the stage reward: "
            "make run STAGE=reward"
        )
    return artifact


def _promoted(model: str) -> ModelVersionResponse:
    state = stages(model)
    held = state.production[-1] if state.production else state.staging
    if held is None:
        raise RequestError(
            f"No version of {model} is promoted yet. A run promotes its version if it passes "
            "its gate. To use another version, add VERSION=…: `make models` lists all versions."
        )
    return Client().get_model_version(model, held.id)


def merged_model(found: Found, recipe: Recipe, settings: Settings) -> ArtifactVersionResponse:
    """The merged model in the precision of `merged_device`.

    A merged model is made once for each precision and repetition penalty, and registered as the version's artifact
    `merged_model`.

    Raises:
        RequestError: the version has no held-out rows for the verification, or its base model is missing or has changed.
        WorkError: the merged model differs from the trained model. It is then not registered.
    """
    dtype = merged_device(recipe.compute.here).dtype
    penalty = recipe.evaluation.repetition_penalty
    facts = [f"dtype:{precision(dtype)}", f"repetition_penalty:{penalty}"]
    registered = newest_stored(MERGED, facts, model_version_id=found.version.id)
    if registered is not None:
        return registered
    check_unchanged(found.base)
    rows = formatted_rows(found)
    trained = Trained(found.base, found.folders[found.name])
    with tempfile.TemporaryDirectory(prefix="merged-") as temporary:
        target = Path(temporary, "model")
        verification = merge(trained, rows, choose_device(recipe.compute.here), dtype, settings, target, penalty)
        logger.info("Verified: %s", verification.sentence)
        return _register(found, target, verification, penalty)


def formatted_rows(found: Found, split: str = "test", most: int = MAX_ROWS) -> list[HeldoutRow]:
    """The first rows of a split of a version. With those of `test`, its files are compared with the trained model.

    Raises:
        RequestError: the version has none.
    """
    rows_of = [name for kind in _VERIFIED_WITH for name, stage in STAGES.items() if stage.rows == kind]
    versions = (found.version.get_artifact(f"formatted_{name}") for name in rows_of)
    formatted = next((version for version in versions if version is not None), None)
    if formatted is None:
        raise RequestError(
            f"Version {found.version.number} has no held-out rows (artifact formatted_…), so its merged model cannot be "
            "verified. Choose another version: `make models` lists all versions."
        )
    rows = formatted.load()[split]
    records = islice(stream_records(rows), most)
    # A prompt has no answer, so the model is compared on its own tokens.
    keys = ("prompt_ids", "prompt_ids") if "prompt_ids" in rows.column_names else ("input_ids", "labels")
    return [HeldoutRow(record["id"], *(record[key] for key in keys)) for record in records]


def _register(
    found: Found, folder: Path, verification: Verification, repetition_penalty: float
) -> ArtifactVersionResponse:
    facts = {
        **verification.model_dump(exclude_none=True),
        "stage": found.name,
        "repetition_penalty": repetition_penalty,
    }
    saved = save_artifact(Directory(path=folder), MERGED, materializer=DirectoryMaterializer, user_metadata=facts)
    link_artifact_version_to_model_version(saved, found.version)
    logger.info("Registered:  %s version %s", MERGED, saved.version)
    return saved


def copy_model(folder: Path, more: Mapping[str, bytes], output: Path) -> None:
    """Copy the files of a model, and write more files, to a folder, which gets its name when all of them are there.

    Raises:
        RequestError: the folder cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        for name, content in more.items():
            (partial / name).write_bytes(content)
        # An empty folder may be there.
        partial.rename(output)
    except OSError as error:
        raise RequestError(
            f"OUTPUT {output} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error
