"""Checks of a recipe that a dry run and a run share."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

import llm_engineering
from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.reading.sources import dataset_files
from llm_engineering.documents.read import hold_out_documents
from llm_engineering.models.device import (
    Device,
    check_processes,
    check_training,
    check_vllm,
    choose_backend,
    choose_device,
)
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig, embedded_version
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger("llm_engineering.run")

# Answers about models that are stored: some 200 bytes each.
_REMEMBERED = 500


def with_held_out_documents(recipe: Recipe) -> Recipe:
    """The recipe with a `data.split` that holds documents out, if it has few of them."""
    if not recipe.learns_from_documents:
        return recipe
    split = hold_out_documents(recipe.documents, recipe.data.split)
    held_out: Recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": split})})
    return held_out


def check_local_datasets(recipe: Recipe) -> None:
    """Open the user's own datasets that lie on this machine. Datasets of the hub are opened when a run starts.

    Raises:
        RequestError: a file is missing, or its format is unknown.
    """
    data = recipe.data
    for kind in ("instruction", "preference", "labelled", "prompt"):
        for reference in filter(None, (data.file(kind), data.test_file(kind))):
            if dataset_files(reference) is not None:
                open_dataset(reference, kind, data)


def check_machine(recipe: Recipe) -> bool:
    """Check the device, the processes and the method of training; returns whether unsloth will be the backend.

    For a job on another machine this is True only if the recipe says `backend: unsloth`. With `backend: auto` the job decides, because
    only the job can inspect its machine.
    """
    compute = recipe.compute
    if compute.target != "local":
        choose_device(compute.one_process)
        return compute.backend == "unsloth"
    device = choose_device(compute)
    check_processes(compute, device)
    return checked_device(recipe, device).backend == "unsloth"


def checked_device(recipe: Recipe, device: Device) -> Device:
    """Check the method and the optimisers, and choose the backend."""
    for stage in recipe.chain:
        config = recipe.block(stage)
        check_training(stage, recipe.method, config.optim, device)
        if config.library_arguments.get("use_vllm"):
            check_vllm(f"{stage}.use_vllm", "false", device)
    if recipe.generation.engine == "vllm":
        check_vllm("generation.engine", "transformers", device)
    keys, new = recipe.lora.beyond_unsloth, recipe.model.added_tokens
    return choose_backend(device, recipe.compute, recipe.method, adapter_keys=keys, new_tokens=new)


def check_model(recipe: Recipe) -> None:
    """Check the recipe against the model's configuration, without its weights, and log the layers without an adapter.

    Raises:
        RequestError: the model cannot be trained as the recipe says.
    """
    for level, note in remembered(recipe.model, recipe.model_dump(mode="json"), lambda: _notes_on_model(recipe)):
        logger.log(level, "%s", note)


def _notes_on_model(recipe: Recipe) -> list[tuple[int, str]]:
    # These imports take seconds, and a recipe that was found fit before does without.
    from llm_engineering.models.base_model import check_generation_config, load_config
    from llm_engineering.models.fit import check_fit, left_out

    if recipe.model.name_or_path != EMBEDDED_MODEL:
        check_generation_config(recipe.model, Settings())
    trained = check_fit(recipe, load_config(recipe.model, Settings()))
    if recipe.cpt is not None and "cpt" in recipe.chain and recipe.cpt.embedding_learning_rate is not None:
        from llm_engineering.training.cpt import check_trained_embeddings

        check_trained_embeddings(trained)
    return left_out(trained)


def remembered(model: ModelConfig, asked: Any, answer: Callable[[], Any]) -> Any:
    """Return `answer()`, or the value that an earlier command stored for the same model, question, code and library versions.

    Values are JSON, in the cache folder. Models of the hub and remote code can change, so nothing is stored about them.
    """
    files = _configuration(model)
    if files is None:
        return answer()
    key = hashlib.sha256(json.dumps([asked, files, _code()]).encode()).hexdigest()
    path = Settings().llm_cache_dir / "plans.json"
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # A damaged cache is written anew.
        known = {}
    if key not in known:
        known = {**dict(list(known.items())[1 - _REMEMBERED :]), key: answer()}
        # A dry run also works where nothing can be written.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(".plans.lock")):
                partial = path.with_name(".plans.partial")
                partial.write_text(json.dumps(known), encoding="utf-8")
                partial.replace(path)
    return known[key]


@cache
def _code() -> str:
    """Hash of this project's library, and of the versions of the libraries that decide the shapes of a model and its adapter."""
    digest = hashlib.sha256(" ".join(map(importlib.metadata.version, ("torch", "transformers", "peft"))).encode())
    for source in sorted(Path(llm_engineering.__path__[0]).rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _configuration(model: ModelConfig) -> list[str] | None:
    """What describes a model whose files are on this machine; None for another."""
    if model.name_or_path == EMBEDDED_MODEL:
        return [embedded_version()]
    folder = Path(model.name_or_path).expanduser()
    if model.trust_remote_code or not folder.is_dir():
        return None
    return [
        file.read_text(encoding="utf-8") if file.is_file() else ""
        for file in (folder / "config.json", folder / "generation_config.json")
    ]
