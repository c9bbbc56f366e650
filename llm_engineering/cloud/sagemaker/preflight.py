"""Checks everything that can make a SageMaker job fail, before it starts, and reports all problems at once.

`problems` calls the checks. They are defined below it, in the order of the calls. If the account's policies forbid a check,
or the network prevents it, a warning takes its place.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import httpx
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from botocore.session import get_session
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from llm_engineering.cloud.container import secret_object
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.request import machines
from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL, ModelConfig

logger = logging.getLogger(__name__)

_SAGEMAKER = "sagemaker.amazonaws.com"
_TOKEN = "HF_TOKEN"
# Error codes of missing permissions. The answer to S3's HeadBucket has only the HTTP status.
_FORBIDDEN = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403"})
_ECR = re.compile(
    r"(?P<registry>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9][a-z0-9._/-]*)(:(?P<tag>[\w.-]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_GIB = 2**30
# training/train.py keeps two checkpoints while it writes a third.
_CHECKPOINTS = 3
# Disk space for data, caches and the libraries' own files.
_OTHER_BYTES = 10 * _GIB


class Problem(NamedTuple):
    """A reason why a job would fail. A warning means that the job may start late, or that a check could not run."""

    what: str
    remedy: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'Warning: ' if self.is_warning else ''}{self.what}. {self.remedy}."


def check(recipe: Recipe, account: Account, settings: Settings) -> None:
    """Log the warnings, and refuse a job that would fail.

    Raises:
        RequestError: a job would fail; the message lists every problem with its remedy.
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
    """Return everything that would make a job of this recipe fail, and the warnings.

    If the region is unknown or the credentials are not valid, the other checks of the account are skipped.

    Args:
        secrets: names of variables that the job's secret must hold, besides those that the recipe needs.
    """
    config = recipe.compute.sagemaker
    if config is None:
        raise RequestError(
            "The recipe trains on this machine, not on SageMaker: there is nothing to check. Choose a recipe with "
            "compute.target sagemaker: make preflight CONFIG=configs/sagemaker_8b.yaml"
        )
    needs_token, found = _model_problems(recipe.model, settings)
    found += _volume_problems(recipe, config, settings)
    caller = _region_problem(account.region) or _caller(account)
    if isinstance(caller, Problem):
        return [caller, *found]
    needed = {*secrets, *([_TOKEN] if needs_token else [])}
    return [
        *tried(f"The role {account.role}", partial(_role_problems, account, caller)),
        *tried("The right to pass the role", partial(_pass_role_problems, account, caller)),
        *tried(f"The bucket {account.bucket}", partial(_bucket_problems, account)),
        *tried(f"The image {account.image}", partial(_image_problems, account)),
        *tried(f"The instance types in {account.region}", partial(_type_problems, config, account)),
        *tried("The service quota", partial(_quota_problems, config, account)),
        *tried("The secret", partial(_secret_problems, account, needed)),
        *found,
    ]


def tried(subject: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    """Run a check of the account and return its problems.

    If AWS forbids a request or cannot be reached, the check ends. A warning is added to the problems found before.
    """
    found: list[Problem] = []
    try:
        for problem in check():
            found.append(problem)  # noqa: PERF402 — extend would lose the problems before an error
    except ClientError as error:
        code = _code(error)
        if code in _FORBIDDEN:
            reason = f"these credentials may not do {error.operation_name}"
        else:
            reason = f"{error.operation_name} answered {code}: {error.response['Error'].get('Message', '')}"
        remedy = "Use the policy docs/aws/launcher.json, which allows every check, or check this yourself"
        found.append(Problem(f"{subject} could not be checked: {reason.rstrip(': .')}", remedy, is_warning=True))
    except BotoCoreError as error:
        reason = str(error).rstrip(".")
        found.append(Problem(f"{subject} could not be checked: {reason}", "Check the network", is_warning=True))
    return found


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


def _volume_problems(recipe: Recipe, config: SageMakerConfig, settings: Settings) -> Iterator[Problem]:
    """Check that the disk of the job is large enough."""
    size = config.volume_size_gb
    try:
        needed = volume_bytes(recipe, settings)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        yield Problem(
            f"The size of {recipe.model.name_or_path} is not known: {reason}",
            f"Make sure that compute.sagemaker.volume_size_gb {size} is enough for it",
            is_warning=True,
        )
        return
    if needed > size * _GIB:
        yield Problem(
            f"compute.sagemaker.volume_size_gb {size} is too small: model, checkpoints and results take about "
            f"{needed / _GIB:.0f} GB",
            f"Set it to {math.ceil(needed * 1.2 / _GIB)} or more",
        )


def volume_bytes(recipe: Recipe, settings: Settings) -> int:
    """Bytes that a job needs on its disk, computed from the model's config, without its weights.

    The sum of:
    - the base model: its parameters times the bytes of `config.dtype` (bfloat16 if the config names none);
    - three checkpoints: 12 bytes for each trained parameter (float32 weight and AdamW's two moments);
    - the result: 4 bytes for each trained parameter;
    - 10 GiB for data and caches.

    Raises:
        OSError, ValueError: the model's config cannot be loaded.
    """
    # Imported only here: schedules import this module, and their `--help` must not wait for torch.
    import torch
    from transformers import AutoModelForCausalLM

    from llm_engineering.models.base_model import load_config
    from llm_engineering.training.policy import with_shapes

    config = load_config(recipe.model, settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        parameters: int = sum(parameter.numel() for parameter in model.parameters())
        if recipe.method == "full":
            trained = parameters
        else:
            adapted = with_shapes(model, recipe.lora)
            trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    dtype: torch.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return parameters * dtype.itemsize + trained * (12 * _CHECKPOINTS + 4) + _OTHER_BYTES


def _region_problem(region: str) -> Problem | None:
    """Check that boto3 lists the region as a region of SageMaker."""
    session = boto3.Session()
    partitions = session.get_available_partitions()
    known = [r for p in partitions for r in session.get_available_regions("sagemaker", partition_name=p)]
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
        return Problem(f"The AWS credentials are refused ({_code(error)})", remedy)
    except BotoCoreError as error:
        remedy = "Check the network, AWS_REGION, and the profile in ~/.aws/config"
        return Problem(f"AWS cannot be reached: {str(error).rstrip('.')}", remedy)


def _role_problems(account: Account, caller: str) -> Iterator[Problem]:
    """Check that the job's role exists, is in the caller's account, and trusts SageMaker."""
    own, role_account = caller.split(":")[4], account.role.split(":")[4]
    if own != role_account:
        yield Problem(
            f"The role {account.role} is in account {role_account}, but the credentials belong to account {own}",
            "Set SAGEMAKER_ROLE to a role of the same account, or AWS_PROFILE to a profile of the other account",
        )
        return
    yield from trust_problems(account.client("iam"), account.role, _SAGEMAKER, "job")


def trust_problems(iam: Any, role: str, service: str, policies: str) -> Iterator[Problem]:
    """Check that a role exists and lets a service assume it.

    Args:
        iam: a boto3 client.
        role: the ARN of the role.
        service: the service's principal, such as `sagemaker.amazonaws.com`.
        policies: the role's files are `docs/aws/<policies>.json` and `docs/aws/<policies>-trust.json`.
    """
    name, trust = role.rpartition("/")[2], f"docs/aws/{policies}-trust.json"
    try:
        document = iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]
    except iam.exceptions.NoSuchEntityException:
        create = f"aws iam create-role --role-name {name} --assume-role-policy-document file://{trust}"
        yield Problem(
            f"There is no role {name}", f"Create it with `{create}`, and add the policy docs/aws/{policies}.json"
        )
        return
    if not trusts(document, service):
        yield Problem(
            f"The role {name} does not let {service} assume it",
            f"Run `aws iam update-assume-role-policy --role-name {name} --policy-document file://{trust}`",
        )


def trusts(document: dict[str, Any], service: str) -> bool:
    """Whether a trust policy lets a service assume its role. Conditions are ignored."""
    for statement in listed(document["Statement"]):
        principal = statement.get("Principal", {})
        # A principal that is a string is "*": everybody.
        services = listed(principal.get("Service", [])) if isinstance(principal, dict) else [service]
        allowed = statement["Effect"] == "Allow" and "sts:AssumeRole" in listed(statement["Action"])
        if allowed and service in services:
            return True
    return False


def _pass_role_problems(account: Account, caller: str) -> Iterator[Problem]:
    """Check with IAM's policy simulator that the caller may pass the role to SageMaker."""
    kind, _, name = caller.split(":", 5)[5].partition("/")
    if kind == "root":
        return
    iam = account.client("iam")
    if kind == "assumed-role":
        # The simulator accepts a role, but not a session of a role.
        caller = iam.get_role(RoleName=name.partition("/")[0])["Role"]["Arn"]
    service = {"ContextKeyName": "iam:PassedToService", "ContextKeyValues": [_SAGEMAKER], "ContextKeyType": "string"}
    answer = iam.simulate_principal_policy(
        PolicySourceArn=caller, ActionNames=["iam:PassRole"], ResourceArns=[account.role], ContextEntries=[service]
    )
    if any(result["EvalDecision"] != "allowed" for result in answer["EvaluationResults"]):
        yield Problem(
            f"{caller} may not pass the role {account.role} to SageMaker",
            "Allow it iam:PassRole on that role: docs/aws/launcher.json has the statement",
        )


def _bucket_problems(account: Account) -> Iterator[Problem]:
    """Check that the bucket exists, is in the job's region, and accepts an empty object below the prefix."""
    s3 = account.client("s3")
    try:
        region = s3.head_bucket(Bucket=account.bucket).get("BucketRegion")
    except ClientError as error:
        region = error.response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if _code(error) == "404":
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
        if _code(error) not in _FORBIDDEN:
            raise
        yield Problem(
            f"s3://{account.bucket}/{account.prefix}/ cannot be written to",
            "Allow these credentials s3:PutObject there (docs/aws/launcher.json), or check the bucket's own policy"
            + (f" and the policy of the key {account.kms_key}" if account.kms_key else ""),
        )


def _image_problems(account: Account) -> Iterator[Problem]:
    """Check that the image is in ECR, in the job's region."""
    parts = _ECR.fullmatch(account.image)
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


def _type_problems(config: SageMakerConfig, account: Account) -> Iterator[Problem]:
    """Check that SageMaker knows the instance types, and that EC2 lists them for the region."""
    known = get_session().get_service_model("sagemaker").shape_for("TrainingInstanceType").enum
    asked = {}
    for instance_type in dict.fromkeys(machine.instance_type for machine in machines(config)):
        if instance_type in known:
            asked[instance_type.removeprefix("ml.")] = instance_type
            continue
        near = get_close_matches(instance_type, known, n=3)
        hint = f"perhaps {' or '.join(near)} is meant" if near else "https://aws.amazon.com/sagemaker/pricing/"
        yield Problem(f"SageMaker trains on no {instance_type}", f"Correct compute.sagemaker: {hint}")
    if not asked:
        return
    # SageMaker does not list the types of a region. EC2 lists them, without the prefix `ml.`.
    pages = account.client("ec2").get_paginator("describe_instance_type_offerings")
    filters = [{"Name": "instance-type", "Values": sorted(asked)}]
    offered = {
        offering["InstanceType"]
        for page in pages.paginate(LocationType="region", Filters=filters)
        for offering in page["InstanceTypeOfferings"]
    }
    for name, instance_type in asked.items():
        if name not in offered:
            yield Problem(
                f"{account.region} has no {instance_type}",
                "Choose another compute.sagemaker.instance_type, or a region that has it "
                f"(`aws ec2 describe-instance-type-offerings --filters Name=instance-type,Values={name} --region …`)",
            )


def _quota_problems(config: SageMakerConfig, account: Account) -> Iterator[Problem]:
    """Check that the quotas allow the recipe's machines. If only a fallback type's quota is too small, this is a warning."""
    names = {m: f"{m.instance_type} for {'spot ' if m.spot else ''}training job usage" for m in machines(config)}
    quotas = _quotas("list_service_quotas", account)
    if not set(names.values()) <= quotas.keys():
        # A quota that was never changed may be listed only among the default quotas.
        quotas = _quotas("list_aws_default_service_quotas", account) | quotas
    for machine, name in names.items():
        is_fallback = machine != machines(config)[0]
        if name not in quotas:
            yield Problem(
                f"There is no quota `{name}` in {account.region}: SageMaker does not offer this type for training there",
                "Choose another type in compute.sagemaker, or another region",
                is_fallback,
            )
            continue
        value, code = quotas[name]
        if value < config.instance_count:
            yield Problem(
                f"The quota `{name}` is {value:.0f}, but the recipe asks for {config.instance_count}",
                f"Run `aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code {code} "
                f"--desired-value {config.instance_count} --region {account.region}`; Amazon answers in minutes to days",
                is_fallback,
            )


def _quotas(operation: str, account: Account) -> dict[str, tuple[float, str]]:
    """SageMaker's quotas: value and code by name."""
    pages = account.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker")
    return {quota["QuotaName"]: (quota["Value"], quota["QuotaCode"]) for page in pages for quota in page["Quotas"]}


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


def listed(value: Any) -> list[Any]:
    """A field of an IAM policy as a list, because a policy may contain a single item in place of a list."""
    return value if isinstance(value, list) else [value]


def _code(error: ClientError) -> str:
    """The service's error code, or the HTTP status for a HEAD request, whose answer has no error code."""
    return str(error.response["Error"]["Code"])
