"""What a run that this machine's timer starts needs of this shell, which will not be there."""

from __future__ import annotations

import os
from typing import get_args

from dotenv import dotenv_values
from pydantic import SecretStr

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import Settings

# Of other libraries: where they find and put things.
_OTHERS = (
    "PATH",
    "TZ",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ENDPOINT_URL",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HTTPS_PROXY",
    "NO_PROXY",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "XDG_CACHE_HOME",
    "ZENML_ACTIVE_STACK_ID",
    "ZENML_CONFIG_PATH",
    "ZENML_LOCAL_STORES_PATH",
)


def environment() -> dict[str, str]:
    """The variables that decide where things are; secrets are not among them, for the entry is plain text.

    Raises:
        RequestError: a secret stands in this shell's environment alone.
    """
    in_file = {name.upper() for name, value in dotenv_values(".env").items() if value}
    secret = {name.upper() for name, field in Settings.model_fields.items() if _is_secret(field.annotation)}
    lost = sorted(name for name in secret if os.environ.get(name) and name not in in_file)
    if lost:
        raise RequestError(
            f"{', '.join(lost)} stands in the environment of this shell, which a timer does not have. Put it into .env "
            "(only you may read it: chmod 600 .env), or unset it."
        )
    names = {name.upper() for name in Settings.model_fields} - secret
    return {name: os.environ[name] for name in sorted(names | set(_OTHERS)) if os.environ.get(name)}


def _is_secret(annotation: object) -> bool:
    return SecretStr in (annotation, *get_args(annotation))
