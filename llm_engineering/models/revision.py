"""Pins the exact revision of a base model, and checks that a base model is still the one that was pinned."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm_engineering.errors import RequestError
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig, embedded_version
from llm_engineering.recipe.settings import Settings

# Smaller files are hashed whole. Of larger ones, the weights, only size and modification time are hashed.
_HASHED_WHOLE_BYTES = 50_000_000


def pin_revision(model: ModelConfig) -> ModelConfig:
    """Resolve the model's exact revision: a package version, a commit of the hub, or a hash of the folder.

    Raises:
        RequestError: there is no such model, or the hub cannot be reached.
    """
    if model.name_or_path == EMBEDDED_MODEL:
        if model.revision is not None:
            raise RequestError(f"model.revision is set, but {EMBEDDED_MODEL} has only one version: remove the key.")
        return model.model_copy(update={"revision": embedded_version()})
    folder = Path(model.name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RequestError(f"model.name_or_path {folder} is a folder without config.json, so it holds no model.")
        return model.model_copy(update={"revision": _folder_hash(folder)})
    if model.name_or_path.startswith(("/", "./", "../", "~")) or model.name_or_path.count("/") > 1:
        raise RequestError(f"model.name_or_path {model.name_or_path}: there is no such folder.")
    if model.name_or_path.startswith("embedded:"):
        raise RequestError(f"model.name_or_path {model.name_or_path}: the only embedded model is {EMBEDDED_MODEL}.")
    # transformers takes seconds to import, and a model on this machine does without.
    from transformers import AutoConfig

    from llm_engineering.models.base_model import hub_options

    try:
        config = AutoConfig.from_pretrained(model.name_or_path, **hub_options(model, Settings()))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"model.name_or_path {model.name_or_path} is not a folder here, and it could not be loaded from the hub: "
            f"{str(error).splitlines()[0]} Without a network, use a local folder or the model that comes with the "
            f"project: --set model.name_or_path={EMBEDDED_MODEL}"
        ) from error
    commit = getattr(config, "_commit_hash", None) or model.revision
    return model.model_copy(update={"revision": commit})


def check_unchanged(model: ModelConfig) -> None:
    """Check that the base model of a trained model is still the one that it was trained on.

    A model of the hub is pinned to a commit, so only a folder and the embedded model can change.

    Args:
        model: the base model with the revision of the training.

    Raises:
        RequestError: the folder is missing, its files have changed, or another version of the embedded model is installed.
    """
    name, then = model.name_or_path, str(model.revision)
    if name != EMBEDDED_MODEL and not then.startswith("folder-"):
        return
    if name != EMBEDDED_MODEL and not Path(name).expanduser().is_dir():
        raise RequestError(
            f"The base model {name} of the trained model is missing. Move its folder back, or put a symbolic link there."
        )
    now = pin_revision(model.model_copy(update={"revision": None})).revision
    if now != then:
        raise RequestError(
            f"The base model {name} has changed since the training: it was {then}, and now it is {now}. On other weights the "
            "trained model would answer differently. Restore the former files with their times, or train again."
        )


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        stat = file.stat()
        digest.update(str(file.relative_to(folder)).encode())
        small = stat.st_size <= _HASHED_WHOLE_BYTES
        digest.update(file.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return f"folder-{digest.hexdigest()[:12]}"
