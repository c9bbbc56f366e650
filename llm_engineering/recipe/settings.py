"""Secrets and machine settings: from the environment or `.env`, never from a recipe."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from llm_engineering.errors import RequestError


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-engineering"


class Settings(BaseSettings):
    """The settings of this machine and its user. Secrets print as asterisks."""

    # Other tools read the same .env, so unknown keys are ignored.
    model_config = SettingsConfigDict(env_file=".env", env_file_encoding="utf-8", extra="ignore", env_ignore_empty=True)

    comet_api_key: SecretStr | None = None
    hf_token: SecretStr | None = None
    openai_api_key: SecretStr | None = None
    wandb_api_key: SecretStr | None = None
    aws_region: str | None = None
    sagemaker_role: str | None = None
    sagemaker_bucket: str | None = None
    sagemaker_image: str | None = None
    # The name of a secret in Secrets Manager: a JSON object of environment variables for the job.
    sagemaker_secret: str | None = None
    # The image with the whole project, for scheduled runs. sagemaker_image contains only what training needs.
    sagemaker_retrain_image: str | None = None
    # The role that EventBridge Scheduler assumes to start jobs.
    scheduler_role: str | None = None
    notify_sns_topic: str | None = None
    notify_webhook: SecretStr | None = None
    # Signatures: the path of a private key in PEM format, or `keyless`; and whose signatures count.
    llm_signing_key: str | None = None
    llm_signing_password: SecretStr | None = None
    llm_signing_public_key: Path | None = None
    llm_signing_identity: str | None = None
    llm_signing_issuer: str | None = None
    # Whether chat, serve, promote, export and push refuse what is not signed.
    llm_require_signature: bool = False
    llm_cache_dir: Path = Field(default_factory=_cache_home)
    llm_output_dir: Path = Path("outputs")

    def check_writable(self) -> None:
        """Create both folders and write to them, so that a wrong path fails before training.

        Raises:
            RequestError: a folder cannot be created or written to.
        """
        for variable, folder in (("LLM_CACHE_DIR", self.llm_cache_dir), ("LLM_OUTPUT_DIR", self.llm_output_dir)):
            check_folder(folder, variable, "the environment or in .env")


def check_folder(folder: Path, variable: str, place: str) -> None:
    """Create a folder and write to it.

    Args:
        variable: the environment variable that names the folder.
        place: where to set the variable.

    Raises:
        RequestError: the folder cannot be created or written to.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(
            f"The folder {folder} cannot be written to ({error.strerror}). "
            f"Set {variable} to a folder that you can write to, in {place}."
        ) from error


def is_loopback(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
