"""Checks everything that can make a SageMaker job fail, before it starts, and reports all problems at once.

`problems` calls the checks. If the account's policies forbid a check, or the network prevents it, a warning takes its place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import httpx
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from llm_engineering.cloud.container import secret_object
from llm_engineering.cloud.package import PROJECT_ROOT
from llm_engineering.cloud.sagemaker.account import Account, botocore_session
from llm_engineering.cloud.sagemaker.machine_checks import machine_problems, small_quotas
from llm_engineering.cloud.sagemaker.problems import FORBIDDEN, Problem, error_code, run_check, with_policies
from llm_engineering.cloud.sagemaker.rights import SAGEMAKER, right_problems
from llm_engineering.cloud.sagemaker.trust import trust_problems
from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings, is_loopback

logger = logging.getLogger(__name__)

_TOKEN = "HF_TOKEN"


def check(recipe: Recipe, account: Account, settings: Settings) -> None:
    """Log the warnings, and refuse a job that would fail.

    Raises:
        RequestError: a job would fail; the message lists every problem with its remedy.
    """
    refuse("The job cannot run on SageMaker yet", problems(recipe, account, settings))


def check_endpoint(recipe: Recipe, config: SageMakerConfig, account: Account, settings: Settings) -> None:
    """Log the warnings, and refuse an endpoint that would fail.

    Args:
        config: the endpoint's machines in `instance_type` and `instance_count`.

    Raises:
        RequestError: the endpoint would fail; the message lists every problem with its remedy.
    """
    caller = _region_problem(account.region) or _caller(account)
    if isinstance(caller, Problem):
        refuse("The endpoint cannot run on SageMaker yet", [caller])
        return
    quotas = {f"{config.instance_type} for endpoint usage": config.instance_count}
    found = [
        *run_check(f"The role {account.role}", partial(_role_problems, recipe, account, caller)),
        *run_check(f"The bucket {account.bucket}", partial(_bucket_problems, account)),
        *run_check(f"The image {account.image}", partial(_image_problems, account)),
        *run_check(
            "The service quota",
            lambda: (problem for _, problem in small_quotas(quotas, account)),
        ),
    ]
    refuse("The endpoint cannot run on SageMaker yet", with_policies(found, account, settings, PROJECT_ROOT))


def refuse(what: str, found: Sequence[Problem]) -> None:
    """Log the warnings among the problems, and raise a RequestError that begins with `what` if there are others."""
    for warning in (problem for problem in found if problem.is_warning):
        logger.warning("%s", warning)
    serious = [problem for problem in found if not problem.is_warning]
    if serious:
        raise RequestError(
            f"{what} ({len(serious)} problem{'s' if len(serious) > 1 else ''}):\n"
            + "\n".join(f"- {problem}" for problem in serious)
        )


def problems(recipe: Recipe, account: Account, settings: Settings, secrets: Sequence[str] = ()) -> list[Problem]:
    """Return everything that would make a job of this recipe fail, and the warnings.

    If the region is unknown or the credentials are not valid, the other checks of the account are skipped.

    Args:
        secrets: names of variables that the job's secret must hold, besides those that the recipe needs.
    """
    config = recipe.compute.sagemaker
    assert config is not None
    needs_token, found = _model_problems(recipe.model, settings)
    caller = _region_problem(account.region) or _caller(account)
    if isinstance(caller, Problem):
        return [caller, *found]
    # Weights that S3 has are downloaded with the token of this machine.
    needed = {*secrets, *([_TOKEN] if needs_token and config.weights == "hub" else [])}
    if config.scope == "chain" and recipe.evaluation.judge is not None and settings.openai_api_key is not None:
        needed.add("OPENAI_API_KEY")
    found = [
        *run_check(f"The role {account.role}", partial(_role_problems, recipe, account, caller)),
        *run_check("What you and the role may do", partial(right_problems, config, account, caller)),
        *run_check(f"The bucket {account.bucket}", partial(_bucket_problems, account)),
        *run_check(f"The image {account.image}", partial(_image_problems, account)),
        *_deepspeed_problems(recipe, account),
        *machine_problems(recipe, config, account, settings),
        # The process of an isolated job reads no secret.
        *([] if config.network_isolation else run_check("The secret", partial(_secret_problems, account, needed))),
        *(_isolation_problems(recipe, config) if config.network_isolation else []),
        *(
            run_check("The image of the steps", partial(_chain_problems, recipe, account, settings))
            if config.scope == "chain"
            else []
        ),
        *found,
    ]
    return with_policies(found, account, settings, PROJECT_ROOT)


def _model_problems(model: ModelConfig, settings: Settings) -> tuple[bool, list[Problem]]:
    """Check that the base model can be downloaded; returns whether that needs a token, and the problems."""
    name = model.name_or_path
    if name == EMBEDDED_MODEL or Path(name).expanduser().is_dir():
        return False, []
    api = HfApi()
    token = settings.hf_token.get_secret_value() if settings.hf_token else False
    try:
        info = api.model_info(name, revision=model.revision, token=token)
        needs_token = bool(info.gated) or bool(info.private)
        if needs_token and token:
            api.auth_check(name, token=token)
            return True, []
    except GatedRepoError:
        needs_token = True
    except RepositoryNotFoundError:
        remedy = "Correct model.name_or_path, or set HF_TOKEN to a token that may read it"
        return False, [Problem(f"The Hugging Face Hub shows no model {name} to you", remedy)]
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        what = f"Whether the job can download {name} could not be checked: {type(error).__name__}"
        return False, [Problem(what, "Check the network and HF_HUB_OFFLINE", is_warning=True)]
    if not needs_token:
        return False, []
    if token:
        what, remedy = f"The token may not load {name}, which is gated", f"Accept its licence: https://hf.co/{name}"
    else:
        what = f"The model {name} is gated or private, and HF_TOKEN is not set"
        remedy = f"Accept its licence at https://hf.co/{name}, and set HF_TOKEN in .env"
    return True, [Problem(what, remedy)]


def _isolation_problems(recipe: Recipe, config: SageMakerConfig) -> Iterator[Problem]:
    """Check that an isolated job needs no network: neither for the weights nor for the metrics."""
    name = recipe.model.name_or_path
    isolated = "compute.sagemaker.network_isolation is true"
    if name != EMBEDDED_MODEL and not Path(name).expanduser().is_dir() and config.weights == "hub":
        yield Problem(
            f"{isolated}, but the job downloads {name} from the Hugging Face Hub", "Set compute.sagemaker.weights to s3"
        )
    if config.scope == "chain" and recipe.evaluation.judge is not None:
        yield Problem(f"{isolated}, but the evaluation asks the model of evaluation.judge", "Remove evaluation.judge")
    if recipe.tracking.comet == "auto":
        yield Problem(f"{isolated}, but the job sends its metrics to Comet", "Set tracking.comet=offline, or off")


def _chain_problems(recipe: Recipe, account: Account, settings: Settings) -> Iterator[Problem]:
    """Check what the jobs of generation and evaluation need besides those of training."""
    image, judge, general = settings.sagemaker_retrain_image, recipe.evaluation.judge, recipe.data.replay_instructions
    if image is None:
        yield Problem(
            "The image for compute.sagemaker.scope chain is not set",
            "Build it with `make image retrain`, and set SAGEMAKER_RETRAIN_IMAGE in .env",
        )
    else:
        yield from _image_problems(replace(account, image=image))
    if judge is not None and judge.base_url is not None and is_loopback(judge.base_url):
        yield Problem(
            f"evaluation.judge.base_url {judge.base_url} is on this machine",
            "Set it to an address that a job can reach",
        )
    is_written_in_job = recipe.generation.client == "local" and recipe.data.file("instruction") is None
    if general is not None and is_written_in_job and Path(general.partition("#")[0]).expanduser().exists():
        yield Problem(
            f"data.replay_instructions {general} is on this machine, and the job that writes questions cannot see it",
            "Use a dataset of the hub or embedded:general, or set compute.sagemaker.scope to training",
        )


def _region_problem(region: str) -> Problem | None:
    """Check that boto3 lists the region as a region of SageMaker."""
    session = botocore_session()
    partitions = session.get_available_partitions()
    known = [r for p in partitions for r in session.get_available_regions("sagemaker", p)]
    if region in known:
        return None
    near = get_close_matches(region, known, n=3) or ["us-east-1", "eu-west-1"]
    return Problem(f"SageMaker has no region {region}", f"Set AWS_REGION in .env, perhaps to {' or '.join(near)}")


def _caller(account: Account) -> str | Problem:
    """The ARN that the credentials belong to, or the problem that prevents calls to AWS."""
    try:
        return str(account.client("sts").get_caller_identity()["Arn"])
    except (NoCredentialsError, PartialCredentialsError):
        remedy = "Run `aws configure sso` and `aws sso login`, or set AWS_PROFILE"
        return Problem("No AWS credentials are found", remedy)
    except ClientError as error:
        remedy = "Renew them: `aws sso login`, or new access keys"
        return Problem(f"The AWS credentials are refused ({error_code(error)})", remedy)
    except BotoCoreError as error:
        remedy = "Check the network, AWS_REGION, and the profile in ~/.aws/config"
        return Problem(f"AWS cannot be reached: {str(error).rstrip('.')}", remedy)


def _role_problems(recipe: Recipe, account: Account, caller: str) -> Iterator[Problem]:
    """Check that the job's role exists, is in the caller's account, and trusts SageMaker."""
    own = caller.split(":")[4]
    if own != account.number:
        yield Problem(
            f"The role {account.role} is in account {account.number}, but the credentials belong to account {own}",
            "Set SAGEMAKER_ROLE to a role of the same account, or AWS_PROFILE to a profile of the other account",
        )
        return
    job = f"training-job/{recipe.name}-{recipe.chain[0]}-{'0' * 12}-0001"
    source = f"arn:{account.partition}:sagemaker:{account.region}:{account.number}:{job}"
    yield from trust_problems(account.client("iam"), account.role, SAGEMAKER, source, "job")


def _bucket_problems(account: Account) -> Iterator[Problem]:
    """Check that the bucket exists, is in the job's region, and accepts an empty object below the prefix."""
    s3 = account.client("s3")
    try:
        region = s3.head_bucket(Bucket=account.bucket).get("BucketRegion")
    except ClientError as error:
        region = error.response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if error_code(error) == "404":
            command = f"aws s3 mb s3://{account.bucket} --region {account.region}"
            yield Problem(f"There is no bucket {account.bucket}", f"Create it with `{command}`")
            return
        if not region:
            raise
    if region and region != account.region:
        yield Problem(
            f"The bucket {account.bucket} is in {region}, but jobs run in {account.region}",
            f"Set AWS_REGION={region}, or SAGEMAKER_BUCKET to a bucket in {account.region}",
        )
        return
    try:
        s3.put_object(Bucket=account.bucket, Key=account.key("writable"), Body=b"", **account.encryption)
    except ClientError as error:
        if error_code(error) not in FORBIDDEN:
            raise
        yield Problem(
            f"s3://{account.bucket}/{account.prefix}/ cannot be written to",
            "Allow these credentials s3:PutObject there (docs/aws/launcher.json), or check the bucket's own policy"
            + (f" and the policy of the key {account.kms_key}" if account.kms_key else ""),
        )


def _deepspeed_problems(recipe: Recipe, account: Account) -> list[Problem]:
    if recipe.compute.distributed != "deepspeed" or "deepspeed" in account.image:
        return []
    what = f"compute.distributed is deepspeed, and the name of the image {account.image} does not say that it has DeepSpeed"
    return [Problem(what, "If it does not, build one with `make image ARGS=--deepspeed`", is_warning=True)]


def _image_problems(account: Account) -> Iterator[Problem]:
    """Check that the image is in ECR, in the job's region."""
    parts = account.image_parts
    if parts is None:
        yield Problem(
            f"The image {account.image} is not in Amazon ECR, and SageMaker takes images only from there",
            "`make image` builds and pushes it, and prints its address for SAGEMAKER_IMAGE",
        )
        return
    repository = parts["repository"]
    if parts["region"] != account.region:
        yield Problem(
            f"The image {account.image} is in {parts['region']}, but jobs run in {account.region}",
            f"Push it there: `make image AWS_REGION={account.region}`",
        )
        return
    ecr = account.client("ecr")
    image = {"imageDigest": parts["digest"]} if parts["digest"] else {"imageTag": parts["tag"] or "latest"}
    try:
        ecr.describe_images(registryId=parts["registry"], repositoryName=repository, imageIds=[image])
    except ecr.exceptions.RepositoryNotFoundException:
        yield Problem(f"There is no repository {repository} in ECR in {account.region}", "`make image` creates it")
    except ecr.exceptions.ImageNotFoundException:
        yield Problem(f"The repository {repository} has no image {account.image}", "`make image` pushes it")


def _secret_problems(account: Account, needed: Iterable[str]) -> Iterator[Problem]:
    """Check that the secret exists, has the form that the container reads, and holds the needed variables."""
    names, secret = sorted(needed), account.secret
    example = json.dumps(dict.fromkeys(names or [_TOKEN], "..."))
    create = (
        f"Run `aws secretsmanager create-secret --name {secret or 'llm-engineering'} --region {account.region} "
        f"--secret-string file://secret.json` with {example} in that file"
    )
    put = f"`aws secretsmanager put-secret-value --secret-id {secret} --secret-string file://secret.json`"
    if secret is None:
        if names:
            yield Problem(
                f"The job needs {' and '.join(names)}, but SAGEMAKER_SECRET is not set",
                f"{create}, and set SAGEMAKER_SECRET=llm-engineering in .env",
            )
        return
    secrets = account.client("secretsmanager")
    try:
        text = secrets.get_secret_value(SecretId=secret).get("SecretString", "")
    except secrets.exceptions.ResourceNotFoundException:
        yield Problem(f"There is no secret {secret} in {account.region}", f"{create}, or unset SAGEMAKER_SECRET")
        return
    variables = secret_object(text)
    if variables is None:
        yield Problem(f"The secret {secret} is not a JSON object of strings", f"Run {put} with {example} in that file")
        return
    missing = [name for name in names if not variables.get(name)]
    if missing:
        yield Problem(f"The secret {secret} lacks {' and '.join(missing)}", f"Add it: {put}")
