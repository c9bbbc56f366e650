"""Everything that would make a job fail, looked at before it starts: all problems at once, each with its remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from llm_engineering.compute.sagemaker import access, capacity, places
from llm_engineering.compute.sagemaker.account import Account
from llm_engineering.compute.sagemaker.problems import Problem, tried
from llm_engineering.config import EMBEDDED_MODEL, ModelConfig, Recipe
from llm_engineering.errors import RequestError
from llm_engineering.settings import Settings

logger = logging.getLogger(__name__)

_TOKEN = "HF_TOKEN"


def check(recipe: Recipe, account: Account, settings: Settings) -> None:
    """Log what is a warning, and refuse what would fail.

    Raises:
        RequestError: a job would fail; every problem is named with its remedy.
    """
    found = problems(recipe, account, settings)
    for warning in (problem for problem in found if problem.is_warning):
        logger.warning("%s", warning)
    serious = [problem for problem in found if not problem.is_warning]
    if serious:
        raise RequestError(
            f"The job cannot run on SageMaker yet ({len(serious)} problem{'s' if len(serious) > 1 else ''}):\n"
            + "\n".join(f"- {problem}" for problem in serious)
        )


def problems(recipe: Recipe, account: Account, settings: Settings, secrets: Sequence[str] = ()) -> list[Problem]:
    """What stands in the way of a job of this recipe; empty where nothing does.

    `secrets` are variables that the job's secret has to hold, besides what the recipe asks for. A check that the
    credentials do not allow is a warning. Without valid credentials nothing is asked of AWS.
    """
    config = recipe.compute.sagemaker
    if config is None:
        raise RequestError(
            "The recipe trains here, not on SageMaker: there is nothing to check. Name one with "
            "compute.target sagemaker: make preflight CONFIG=configs/sagemaker_8b.yaml"
        )
    needs_token, found = _model_problems(recipe.model, settings)
    found += capacity.wait_problems(config)
    found += _volume_problems(recipe, settings)
    wrong_region = list(access.region_problems(account.region))
    arn, unknown = (None, wrong_region) if wrong_region else access.caller(account)
    if arn is None:
        return [*unknown, *found]
    needed = {*secrets, *([_TOKEN] if needs_token else [])}
    return [
        *tried(f"The role {account.role}", partial(access.role_problems, account, arn)),
        *tried("The right to pass the role", partial(access.pass_role_problems, account, arn)),
        *tried(f"The bucket {account.bucket}", partial(places.bucket_problems, account)),
        *tried(f"The image {account.image}", partial(places.image_problems, account)),
        *tried(f"Whether {account.region} has the machines", partial(capacity.type_problems, config, account)),
        *tried("The service quota", partial(capacity.quota_problems, config, account)),
        *tried("The secret", partial(access.secret_problems, account, needed)),
        *found,
    ]


def _model_problems(model: ModelConfig, settings: Settings) -> tuple[bool, list[Problem]]:
    """Whether a token is needed to load the base model, and what stands in the way."""
    name = model.name_or_path
    if name == EMBEDDED_MODEL or Path(name).expanduser().is_dir():
        return False, []
    api = HfApi()
    token = settings.hf_token.get_secret_value() if settings.hf_token else False
    try:
        info = api.model_info(name, revision=model.revision, token=token)
        is_closed = bool(info.gated) or bool(info.private)
        if is_closed and token:
            api.auth_check(name, token=token)
    except GatedRepoError:
        return True, [_refused(name, bool(token))]
    except RepositoryNotFoundError:
        remedy = "Correct model.name_or_path, or set HF_TOKEN to a token that sees it"
        return False, [Problem(f"The hub has no model {name} that can be seen from here", remedy)]
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        said = f"Whether {name} can be loaded in the job could not be checked: {type(error).__name__}"
        return False, [Problem(said, "Check the network and HF_HUB_OFFLINE", is_warning=True)]
    return is_closed, [] if token or not is_closed else [_refused(name, False)]


def _refused(name: str, has_token: bool) -> Problem:
    if has_token:
        return Problem(f"The token may not load {name}, which is gated", f"Accept its licence: https://hf.co/{name}")
    return Problem(
        f"The model {name} is gated, and there is no HF_TOKEN here to look at it",
        f"Accept its licence at https://hf.co/{name}, and set HF_TOKEN in .env",
    )


def _volume_problems(recipe: Recipe, settings: Settings) -> Iterator[Problem]:
    config = recipe.compute.sagemaker
    assert config is not None
    try:
        yield from capacity.volume_problems(recipe, config, settings)
    except (OSError, ValueError) as error:
        yield Problem(
            f"The size of {recipe.model.name_or_path} is not known: {str(error).splitlines()[0].rstrip('.')}",
            f"Make sure that compute.sagemaker.volume_size_gb {config.volume_size_gb} is enough for it",
            is_warning=True,
        )
