"""Prepares the runs of a schedule: the request for a SageMaker job with its uploads, or the timer of this machine."""

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

from llm_engineering.cloud.package import PROJECT_ROOT
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.preflight import problems, refuse
from llm_engineering.cloud.sagemaker.problems import POLICIES, Problem, run_check, with_policies
from llm_engineering.cloud.sagemaker.request import INPUTS, machines, training_job_request
from llm_engineering.cloud.sagemaker.s3 import upload_code
from llm_engineering.cloud.sagemaker.trust import put_policy, trust_problems
from llm_engineering.cloud.schedules import local_schedules
from llm_engineering.cloud.schedules.alerts import PREFIX, topic_problems
from llm_engineering.cloud.schedules.cron import Timing
from llm_engineering.cloud.schedules.eventbridge import EXECUTION
from llm_engineering.cloud.schedules.job_recipe import RECIPE_CHANNEL, RECIPE_FILE, JobRecipe, job_recipe
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.cloud.schedules.run_records import JOB_VARIABLE, job_prefix
from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings, is_loopback
from tools.readiness import CODE_VARIABLE, code_version

logger = logging.getLogger("llm_engineering.schedule")

STORE_URL = "ZENML_STORE_URL"
STORE_API_KEY = "ZENML_STORE_API_KEY"
_SCHEDULER = "scheduler.amazonaws.com"
# EventBridge Scheduler's limit for the input of a target.
_MAX_INPUT_BYTES = 262_144
# Variables of other programs and libraries that a run on a timer also needs.
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
    """The ZenML server that a run reports to: its active stack and project, and whether it requires an API key."""

    url: str
    stack_id: str
    project_id: str
    has_logins: bool


def job_request(name: str, recipe: Recipe, settings: Settings, session: boto3.Session) -> dict[str, Any]:
    """Check everything that a run needs, upload code and recipe, and build the request that the schedule sends.

    Returns:
        The parameters of CreateTrainingJob, with EXECUTION in place of the start's id.

    Raises:
        RequestError: something is missing; the message lists the problems with their remedies.
    """
    config = recipe.compute.sagemaker
    if config is None:
        raise RequestError(
            "The recipe has no block compute.sagemaker, so the machine of the job is unknown. Choose a recipe with this block "
            "(CONFIG=configs/sagemaker_8b.yaml), or create the schedule on this machine (TARGET=local)."
        )
    if config.instance_count > 1:
        raise RequestError(
            f"A scheduled run uses one machine, but compute.sagemaker.instance_count is {config.instance_count}. "
            "Set it to 1, and choose a machine with more GPUs."
        )
    if config.network_isolation:
        raise RequestError(
            "A scheduled run reports to a ZenML server, which it cannot reach with compute.sagemaker.network_isolation. Set it to false."
        )
    image = settings.sagemaker_retrain_image
    # If SAGEMAKER_RETRAIN_IMAGE is not set, `_check` reports it together with all other problems. The training image
    # cannot replace it, because it has no ZenML.
    account = Account.resolve(config.model_copy(update={"image": image or "none"}), settings)
    server = _server(session)
    _check(name, recipe, account, settings, session, server)
    # All files of the schedule are in one folder, which is removed with the schedule.
    account = replace(account, prefix=account.key("schedules", name))
    job = job_recipe(recipe, account.bucket, account.client("s3"))
    if len(machines(config)) > 1:
        logger.info("The schedule starts only %s: it does not try the fallback types or on demand", machines(config)[0])
    logger.info(
        "Each run costs at most %.1f hours of %s%s (compute.sagemaker.max_run_s)",
        config.max_run_s / 3600,
        config.instance_type,
        ", spot" if config.use_spot else "",
    )
    return _request(name, config, account, job, server)


def write_local(name: str, timing: Timing, recipe: Recipe | None, folder: Path, former: LocalSchedule | None) -> None:
    """Create or change a schedule of this machine.

    Args:
        folder: the folder of all schedules.
        recipe: None keeps the recipe of `former`.
        former: the schedule to change; None creates a new one.

    Raises:
        RequestError: a schedule of this name exists, or this machine cannot run this one.
    """
    now = datetime.now(UTC)
    if former is None and (folder / name).exists():
        raise RequestError(
            f"This machine already has a schedule {name}. `make schedule-change NAME={name}` changes it, "
            f"`make unschedule NAME={name}` removes it."
        )
    scheduler = former.scheduler if former is not None else local_schedules.scheduler()
    local_schedules.check(timing, scheduler, now)
    if recipe is not None and recipe.compute.target != "local":
        logger.info("compute.target is %s, but the runs of this schedule train on this machine", recipe.compute.target)
        recipe = recipe.model_copy(
            update={"compute": recipe.compute.model_copy(update={"target": "local", "sagemaker": None})}
        )
    schedule = LocalSchedule(
        name=name,
        timing=timing,
        scheduler=scheduler,
        created=former.created if former is not None else now,
        folder=folder / name,
        directory=Path.cwd(),
        environment=environment(),
    )
    paused = former is not None and local_schedules.state(former) == "paused"
    kept = recipe.model_dump_json(indent=1) if recipe is not None else None
    local_schedules.write(schedule, kept, paused)


def environment() -> dict[str, str]:
    """The environment variables that a timer on this machine needs, with their values in this shell.

    Secrets are left out, because the timer's entry is plain text.

    Raises:
        RequestError: a secret is set in this shell but not in .env.
    """
    in_file = {name.upper() for name, value in dotenv_values(".env").items() if value}
    secret = {name.upper() for name, field in Settings.model_fields.items() if _is_secret(field.annotation)}
    lost = sorted(name for name in secret if os.environ.get(name) and name not in in_file)
    if lost:
        raise RequestError(
            f"{', '.join(lost)} is set only in this shell, and a timer does not have this shell's environment. Put it into .env "
            "(and let only you read the file: chmod 600 .env), or unset it."
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
            # Folders for ZenML's own files. They are on the job's machine and belong to this job alone.
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
        raise RequestError(
            f"The request for the job has {size} bytes, but EventBridge Scheduler accepts at most {_MAX_INPUT_BYTES}. "
            "Use fewer S3 addresses in the recipe's `data`, or fewer tags in compute.sagemaker.tags."
        )
    return request


def _upload_recipe(account: Account, job: JobRecipe) -> str:
    """Upload the recipe and its files; returns their folder in S3.

    The folder's name is a hash of the content, so a change of the schedule does not change the files of a running job.
    """
    s3, contents = account.client("s3"), {name: file.read_bytes() for name, file in job.files.items()}
    contents[RECIPE_FILE] = job.recipe.model_dump_json(indent=1).encode()
    version = recipe_hash({name: content.hex() for name, content in contents.items()})
    for name, content in contents.items():
        key = account.key("recipe", version, name)
        s3.put_object(Bucket=account.bucket, Key=key, Body=content, **account.encryption)
    return account.uri("recipe", version) + "/"


def _check(
    name: str, recipe: Recipe, account: Account, settings: Settings, session: boto3.Session, server: Server
) -> None:
    """Check everything that the schedule and its jobs need in the AWS account.

    Raises:
        RequestError: something is missing; the message lists every problem with its remedy.
    """
    needed = [STORE_API_KEY] if server.has_logins else []
    # The job has no .env. So each secret that is set here must also be in the job's secret.
    needed += [key.upper() for key, value in dict(settings).items() if isinstance(value, SecretStr)]
    found = [*_setting_problems(settings)]
    if settings.scheduler_role is not None:
        role = settings.scheduler_role
        group = f"arn:{account.partition}:scheduler:{account.region}:{account.number}:schedule-group/{PREFIX}{name}"
        trust = partial(trust_problems, session.client("iam"), role, _SCHEDULER, group, "scheduler")
        found += run_check(f"The role {role}", trust)
    if settings.notify_sns_topic is not None:
        topic = settings.notify_sns_topic
        found += run_check(f"The topic {topic}", partial(topic_problems, session, topic))
    # The function `problems` would look up the S3 address as a model name on the hub. So for a model in S3, this check
    # uses the default model instead, and the job checks the real one.
    in_s3 = recipe.model.name_or_path.startswith("s3://")
    found = with_policies(found, account, settings, PROJECT_ROOT)
    found += problems(
        recipe.model_copy(update={"model": ModelConfig()}) if in_s3 else recipe, account, settings, needed
    )
    refuse("The schedule cannot be created yet", found)


def _setting_problems(settings: Settings) -> Iterator[Problem]:
    if settings.sagemaker_retrain_image is None:
        yield Problem(
            "The image for retraining is not set", "Build it with `make image`, and set SAGEMAKER_RETRAIN_IMAGE in .env"
        )
    if settings.scheduler_role is None:
        role = "llm-engineering-scheduler"
        yield Problem(
            "The role for EventBridge Scheduler is not set",
            f"Create one with `aws iam create-role --role-name {role} --assume-role-policy-document "
            f"file://{POLICIES}/scheduler-trust.json` and `{put_policy(role, 'scheduler')}`, and set SCHEDULER_ROLE in .env to "
            "its ARN",
        )


def _server(session: boto3.Session) -> Server:
    """The ZenML server that this machine is connected to.

    Raises:
        RequestError: a job cannot reach this server, or the active stack does not keep its artifacts in S3.
    """
    url = os.environ.get(STORE_URL, "").rstrip("/")
    if not url:
        raise RequestError(
            f"A scheduled run reports to a ZenML server, but {STORE_URL} is not set. Set {STORE_URL}=https://… in the environment, and "
            "log in with `zenml login`."
        )
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or address.username is not None:
        raise RequestError(
            f"{STORE_URL} is not a valid address. Set it to the address of a ZenML server, https://…, without user and password."
        )
    if is_loopback(url) and not is_loopback(session.client("sts").meta.endpoint_url):
        raise RequestError(
            f"{STORE_URL} {url} is an address of this machine. Set it to an address that a job in AWS can reach."
        )
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
            f"The ZenML server {url} cannot be used ({str(error).splitlines()[0]}). Log in with `zenml login`."
        ) from error
    connected = GlobalConfiguration().store_configuration.url.rstrip("/")
    if connected != url:
        raise RequestError(
            f"{STORE_URL} is {url}, but ZenML is connected to {connected}. Log in with `zenml login {url}`."
        )
    (artifacts,) = stack.components[StackComponentType.ARTIFACT_STORE]
    path = str(artifacts.configuration.get("path", ""))
    if not path.startswith("s3://"):
        raise RequestError(
            f"The active stack {stack.name} stores artifacts {f'in {path}' if path else 'on the local disk'}, so they would be lost "
            "with the job's machine. Register and activate a stack that stores them in S3: `make stack-aws`."
        )
    return Server(url, str(stack.id), str(project.id), str(info.auth_scheme) != "NO_AUTH")


def _is_secret(annotation: object) -> bool:
    return SecretStr in (annotation, *get_args(annotation))
