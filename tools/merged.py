"""The merged and verified model of a version: the registered one, or one that is made and registered now."""

from __future__ import annotations

import logging
import shutil
import tempfile
from itertools import islice
from pathlib import Path

from zenml import save_artifact
from zenml.client import Client
from zenml.model.utils import link_artifact_version_to_model_version

from llm_engineering.data.storage import stream_records
from llm_engineering.errors import RequestError
from llm_engineering.models.device import choose_device
from llm_engineering.publish.merge import MAX_ROWS, Trained, merge, merged_device
from llm_engineering.publish.verification import HeldoutRow, Verification, precision
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from steps.materializers import Directory, DirectoryMaterializer
from tools.promoted import Found

logger = logging.getLogger("llm_engineering.merged")

MERGED = "merged_model"


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
