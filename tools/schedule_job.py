"""What a schedule starts: for SageMaker a checked request with its code and recipe uploaded, here the environment."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import urlsplit

import boto3
from dotenv import dotenv_values
from pydantic import SecretStr

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.preflight import Problem, problems, tried, trust_problems
from llm_engineering.cloud.sagemaker.request import INPUTS, training_job_request
from llm_engineering.cloud.sagemaker.storage import upload_code
from llm_engineering.cloud.schedules import local_schedules
from llm_engineering.cloud.schedules.alerts import topic_problems
from llm_engineering.cloud.schedules.cron import Timing
from llm_engineering.cloud.schedules.eventbridge import EXECUTION
from llm_engineering.cloud.schedules.job_recipe import RECIPE_CHANNEL, RECIPE_FILE, JobRecipe, is_loopback, job_recipe
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.cloud.schedules.run_records import JOB_VARIABLE, job_prefix
from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import ModelConfig
from tools.plan import CODE_VARIABLE, code_version

logger = logging.getLogger("llm_engineering.schedule")

STORE_URL = "ZENML_STORE_URL"
STORE_API_KEY = "ZENML_STORE_API_KEY"
_SCHEDULER = "scheduler.amazonaws.com"
# EventBridge Scheduler's limit of a target's input.
_MAX_INPUT_BYTES = 262_144
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


class Server(NamedTuple):
    """The ZenML server that a run reports to: its active stack and project, and whether it asks for a key."""

    url: str
    stack_id: str
    project_id: str
    has_logins: bool


def job_request(name: str, recipe: Recipe, settings: Settings, session: boto3.Session) -> dict[str, Any]:
    """Check what a run needs, upload what it takes from here, and say what the schedule starts.

    Returns:
        The parameters of CreateTrainingJob, with `schedules.EXECUTION` where the start's id goes.

    Raises:
        RequestError: something is missing; as much as is known is named at once, each with its remedy.
    """
    config = recipe.compute.sagemaker
    if config is None:
        raise RequestError(
            "The recipe has no compute.sagemaker, so there is no machine to start: choose one that has "
            "(CONFIG=configs/sagemaker_8b.yaml), or keep the schedule on this machine: TARGET=local."
        )
    if config.instance_count > 1:
        raise RequestError(
            f"A scheduled run is one job on one machine, and compute.sagemaker.instance_count is {config.instance_count}: "
            "set it to 1, and choose a machine with more cards."
        )
    image = settings.sagemaker_retrain_image
    # What is missing is told with the rest; the image for training alone has no ZenML.
    account = Account.resolve(config.model_copy(update={"image": image or "none"}), settings)
    server = _server(session)
    _check(recipe, account, settings, session, server)
    # All that belongs to the schedule is in one folder, which goes with it.
    account = replace(account, prefix=account.key("schedules", name))
    job = job_recipe(recipe, account.bucket, account.client("s3"))
    if config.fallback_instance_types:
        logger.info("A schedule starts %s alone: fallback_instance_types are not tried", config.instance_type)
    logger.info(
        "Each run costs at most %.1f hours of %s%s (compute.sagemaker.max_run_s)",
        config.max_run_s / 3600,
        config.instance_type,
        ", spot" if config.use_spot else "",
    )
    return _request(name, config, account, job, server)


def write_local(name: str, timing: Timing, recipe: Recipe | None, folder: Path, former: LocalSchedule | None) -> None:
    """Write a schedule of this machine; without a recipe the former one stays."""
    now = datetime.now(UTC)
    if former is None and (folder / name).exists():
        raise RequestError(
            f"There is a schedule {name} on this machine already. `make schedule-change NAME={name}` changes it, "
            f"`make unschedule NAME={name}` removes it."
        )
    keeper = former.keeper if former is not None else local_schedules.keeper()
    local_schedules.check(timing, keeper, now)
    if recipe is not None and recipe.compute.target != "local":
        logger.info("compute.target is %s: on a schedule of this machine, training runs on it", recipe.compute.target)
        recipe = recipe.model_copy(
            update={"compute": recipe.compute.model_copy(update={"target": "local", "sagemaker": None})}
        )
    schedule = LocalSchedule(
        name=name,
        timing=timing,
        keeper=keeper,
        created=former.created if former is not None else now,
        folder=folder / name,
        directory=Path.cwd(),
        environment=environment(),
    )
    paused = former is not None and local_schedules.state(former) == "paused"
    kept = recipe.model_dump_json(indent=1) if recipe is not None else None
    local_schedules.write(schedule, kept, paused)


def environment() -> dict[str, str]:
    """The variables of this shell that decide where things are, for a timer of this machine; secrets are not among them, for the entry is plain text.

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


def _request(name: str, config: SageMakerConfig, account: Account, job: JobRecipe, server: Server) -> dict[str, Any]:
    recipe_file = f"{INPUTS}/{RECIPE_CHANNEL}/{RECIPE_FILE}"
    request = training_job_request(
        job_prefix(name) + EXECUTION,
        [
            "python",
            "-m",
            "tools.cli",
            "run",
            "retrain",
            "--config",
            recipe_file,
            "--scheduled",
            f"s3://{account.bucket}/{account.prefix}",
        ],
        {"code": upload_code(account), RECIPE_CHANNEL: _upload_recipe(account, job), **job.channels},
        {
            JOB_VARIABLE: job_prefix(name) + EXECUTION,
            CODE_VARIABLE: code_version(),
            STORE_URL: server.url,
            "ZENML_ACTIVE_STACK_ID": server.stack_id,
            "ZENML_ACTIVE_PROJECT_ID": server.project_id,
            # What ZenML finds out in the job is of the job alone.
            "ZENML_CONFIG_PATH": "/opt/ml/zenml",
            "ZENML_LOCAL_STORES_PATH": "/opt/ml/zenml/stores",
        },
        account.uri("checkpoints", EXECUTION) + "/",
        account.uri("results"),
        config,
        account,
        {"llm-engineering:schedule": name},
    )
    size = len(json.dumps(request))
    if size > _MAX_INPUT_BYTES:
        raise RequestError(f"The job's description has {size} bytes, and a schedule keeps {_MAX_INPUT_BYTES}.")
    return request


def _upload_recipe(account: Account, job: JobRecipe) -> str:
    """The recipe and its files, in a folder named by their content, so that a job that runs keeps its own."""
    s3, contents = account.client("s3"), {name: file.read_bytes() for name, file in job.files.items()}
    contents[RECIPE_FILE] = job.recipe.model_dump_json(indent=1).encode()
    version = recipe_hash({name: content.hex() for name, content in contents.items()})
    for name, content in contents.items():
        key = account.key("recipe", version, name)
        s3.put_object(Bucket=account.bucket, Key=key, Body=content, **account.encryption)
    return account.uri("recipe", version) + "/"


def _check(recipe: Recipe, account: Account, settings: Settings, session: boto3.Session, server: Server) -> None:
    """Look at everything that the schedule and its jobs need in the account.

    Raises:
        RequestError: something is missing; every problem is named with its remedy.
    """
    needed = [STORE_API_KEY] if server.has_logins else []
    # The job has no .env: what is set here and not there would be lost.
    needed += [name.upper() for name, value in dict(settings).items() if isinstance(value, SecretStr)]
    found = [*_setting_problems(settings)]
    if settings.scheduler_role is not None:
        role = settings.scheduler_role
        found += tried(
            f"The role {role}", partial(trust_problems, session.client("iam"), role, _SCHEDULER, "scheduler")
        )
    if settings.notify_sns_topic is not None:
        topic = settings.notify_sns_topic
        found += tried(f"The topic {topic}", partial(topic_problems, session, topic))
    # A model in S3 is no model of the hub; the job's own check sees it.
    in_s3 = recipe.model.name_or_path.startswith("s3://")
    found += problems(
        recipe.model_copy(update={"model": ModelConfig()}) if in_s3 else recipe, account, settings, needed
    )
    for warning in (problem for problem in found if problem.is_warning):
        logger.warning("%s", warning)
    serious = [f"- {problem}" for problem in found if not problem.is_warning]
    if serious:
        raise RequestError("The schedule cannot be made yet:\n" + "\n".join(serious))


def _setting_problems(settings: Settings) -> Iterator[Problem]:
    if settings.sagemaker_retrain_image is None:
        yield Problem(
            "No image with the whole project is known", "`make image` builds it; set SAGEMAKER_RETRAIN_IMAGE in .env"
        )
    if settings.scheduler_role is None:
        yield Problem(
            "No role is known that EventBridge Scheduler takes on",
            "Make one by docs/aws/scheduler-trust.json and scheduler.json, and set SCHEDULER_ROLE to its ARN in .env",
        )


def _server(session: boto3.Session) -> Server:
    """The server that this machine is connected to.

    Raises:
        RequestError: it is none that a job reaches, or its active stack keeps artifacts on this machine.
    """
    url = os.environ.get(STORE_URL, "").rstrip("/")
    if not url:
        raise RequestError(
            f"A scheduled run reports to a ZenML server, else nobody could browse it: set {STORE_URL}=https://… in the "
            "environment, and log in with `zenml login`."
        )
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or address.username is not None:
        raise RequestError(
            f"{STORE_URL} has to be the address of a ZenML server, https://…, without a name or password."
        )
    if is_loopback(url) and not is_loopback(session.client("sts").meta.endpoint_url):
        raise RequestError(f"{STORE_URL} {url} is this machine's own: name an address that a job in AWS reaches.")
    from tools.cli import prepare_zenml

    prepare_zenml()
    from zenml.client import Client
    from zenml.config.global_config import GlobalConfiguration
    from zenml.enums import StackComponentType
    from zenml.exceptions import ZenMLBaseException

    try:
        client = Client()
        stack, project = client.active_stack_model, client.active_project
        info = client.zen_store.get_store_info()
    except (ZenMLBaseException, RuntimeError, OSError) as error:
        raise RequestError(
            f"The ZenML server {url} does not answer, or not to you ({str(error).splitlines()[0]}). Log in with `zenml login`."
        ) from error
    connected = GlobalConfiguration().store_configuration.url.rstrip("/")
    if connected != url:
        raise RequestError(
            f"{STORE_URL} is {url}, and ZenML is connected to {connected}: log in with `zenml login {url}`."
        )
    (artifacts,) = stack.components[StackComponentType.ARTIFACT_STORE]
    path = str(artifacts.configuration.get("path", ""))
    if not path.startswith("s3://"):
        raise RequestError(
            f"The active stack {stack.name} keeps artifacts {f'in {path}' if path else 'on this machine'}, which is lost with "
            "the job's machine: `make stack-aws` registers one that keeps them in S3, and makes it the active one."
        )
    return Server(url, str(stack.id), str(project.id), str(info.auth_scheme) != "NO_AUTH")


def _is_secret(annotation: object) -> bool:
    return SecretStr in (annotation, *get_args(annotation))
