"""Copies a base model from the Hugging Face Hub to S3 once, where all jobs read it."""

from __future__ import annotations

import logging
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.s3 import is_there
from llm_engineering.errors import WorkError
from llm_engineering.models.base_model import hub_revision
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger(__name__)

# The same weights in formats that transformers does not read, or reads only if there are no safetensors.
_OTHER_FORMATS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pth", "*.pt", "original/*")


def is_copied(config: SageMakerConfig, model: ModelConfig) -> bool:
    """Whether the recipe wants the jobs to read this model from S3 instead of the hub."""
    return config.weights == "s3" and hub_revision(model) is not None


def hub_weights(account: Account, model: ModelConfig, settings: Settings) -> str:
    """Copy a model at its revision file by file, unless S3 has it; returns the address.

    An interrupted copy continues with the files that are missing.

    Raises:
        WorkError: the hub does not give a file.
    """
    name, revision = model.name_or_path, str(hub_revision(model))
    place = account.key("models", "hub", name, revision)
    uri, complete = f"s3://{account.bucket}/{place}/", f"{place}.complete"
    if is_there(account, f"s3://{account.bucket}/{complete}"):
        return uri
    api = HfApi(token=settings.hf_token.get_secret_value() if settings.hf_token else False)
    s3 = account.client("s3")
    try:
        files = api.list_repo_files(name, revision=revision)
        files = [file for file in files if not any(fnmatchcase(file, pattern) for pattern in _OTHER_FORMATS)]
        if any(file.endswith(".safetensors") for file in files):
            files = [file for file in files if not file.endswith(".bin")]
        for number, file in enumerate(files, start=1):
            if is_there(account, f"{uri}{file}"):
                continue
            logger.info("Copying %s to %s: file %d of %d, %s", name, uri, number, len(files), file)
            # One file at a time, so that the disk needs no room for the whole model.
            with tempfile.TemporaryDirectory() as folder:
                local = api.hf_hub_download(name, file, revision=revision, local_dir=folder)
                s3.upload_file(str(Path(local)), account.bucket, f"{place}/{file}", ExtraArgs=account.encryption)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise WorkError(
            f"{name} cannot be copied from the Hugging Face Hub: {error}. Try again, or set compute.sagemaker.weights to hub."
        ) from error
    s3.put_object(Bucket=account.bucket, Key=complete, Body=b"", **account.encryption)
    return uri
