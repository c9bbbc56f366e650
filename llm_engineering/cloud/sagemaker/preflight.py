"""Checks everything that would make a SageMaker job fail, before it starts, and reports all problems at once.

Checked: credentials, the job's role and its trust, the secret; bucket and image; instance types, quotas and disk. A check
that the account forbids becomes a warning.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import httpx
import peft
import torch
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from botocore.session import get_session
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from llm_engineering.cloud.container import secret_object
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.errors import RequestError
from llm_engineering.models.loading import load_config
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.training.policy import lora_config

# How services say that the credentials do not suffice; S3 and HEAD requests have no more than the status.
FORBIDDEN = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403"})


class Problem(NamedTuple):
    """Something that would make a job fail, or, as a warning, could not be looked at or may slow it down."""

    what: str
    remedy: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'Warning: ' if self.is_warning else ''}{self.what}. {self.remedy}."


def tried(subject: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    """A check's problems; a warning where AWS does not let it look, or cannot be asked."""
    found: list[Problem] = []
    try:
        # One by one, so that what was found before an error stays.
        for problem in check():
            found += [problem]
    except ClientError as error:
        code = error_code(error)
        if code in FORBIDDEN:
            why = f"these credentials may not do {error.operation_name}"
        else:
            why = f"{error.operation_name} answered {code}: {error.response['Error'].get('Message', '')}".rstrip(": .")
        found.append(Problem(f"{subject} could not be checked: {why}", _GRANT, is_warning=True))
    except BotoCoreError as error:
        why = str(error).rstrip(".")
        found.append(Problem(f"{subject} could not be checked: {why}", "Check the network", is_warning=True))
    return found


_GRANT = "docs/aws/launcher.json is the policy that allows every check; without it, make sure of this yourself"


def error_code(error: ClientError) -> str:
    """The service's own code; of a HEAD request, which has none, the HTTP status."""
    return str(error.response["Error"]["Code"])


SERVICE = "sagemaker.amazonaws.com"


def region_problems(region: str) -> Iterator[Problem]:
    """Whether SageMaker is there, by boto3's own list."""
    session = boto3.Session()
    partitions = session.get_available_partitions()
    known = [r for p in partitions for r in session.get_available_regions("sagemaker", partition_name=p)]
    if region not in known:
        near = get_close_matches(region, known, n=3) or ["us-east-1", "eu-west-1"]
        yield Problem(f"SageMaker has no region {region}", f"Set AWS_REGION in .env, perhaps to {' or '.join(near)}")


def caller(account: Account) -> tuple[str | None, list[Problem]]:
    """The ARN that the credentials belong to, or why there is none: then nothing else can be asked."""
    try:
        return account.client("sts").get_caller_identity()["Arn"], []
    except (NoCredentialsError, PartialCredentialsError):
        return None, [
            Problem("No AWS credentials are found", "Run `aws configure sso` and `aws sso login`, or set AWS_PROFILE")
        ]
    except ClientError as error:
        said = f"The AWS credentials are refused ({error_code(error)})"
        return None, [Problem(said, "Renew them: `aws sso login`, or new access keys")]
    except BotoCoreError as error:
        why = str(error).rstrip(".")
        remedy = "Check the network, AWS_REGION, and the profile in ~/.aws/config"
        return None, [Problem(f"AWS cannot be asked: {why}", remedy)]


def role_problems(account: Account, arn: str) -> Iterator[Problem]:
    """Whether the job's role is there, belongs to this account, and lets SageMaker take it on."""
    own, of_role = arn.split(":")[4], account.role.split(":")[4]
    if own != of_role:
        yield Problem(
            f"The role {account.role} is in account {of_role}, and the credentials are of {own}",
            "Set SAGEMAKER_ROLE to a role of the same account, or AWS_PROFILE to the other account's profile",
        )
        return
    yield from trust_problems(account.client("iam"), account.role, SERVICE, "job")


def trust_problems(iam: Any, role: str, service: str, policies: str) -> Iterator[Problem]:
    """Whether a role is there and lets a service take it on; `policies` is what its files in docs/aws begin with."""
    name, trust = role.rpartition("/")[2], f"docs/aws/{policies}-trust.json"
    try:
        document = iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]
    except iam.exceptions.NoSuchEntityException:
        create = f"aws iam create-role --role-name {name} --assume-role-policy-document file://{trust}"
        yield Problem(f"There is no role {name}", f"`{create}`, and give it docs/aws/{policies}.json")
        return
    if not trusts(document, service):
        yield Problem(
            f"The role {name} does not let {service} assume it",
            f"`aws iam update-assume-role-policy --role-name {name} --policy-document file://{trust}`",
        )


def trusts(document: dict[str, Any], service: str) -> bool:
    """Whether a trust policy lets a service assume its role. Conditions are not looked at."""
    for statement in listed(document["Statement"]):
        principal = statement.get("Principal", {})
        services = listed(principal.get("Service", [])) if isinstance(principal, dict) else [service]
        allowed = statement["Effect"] == "Allow" and "sts:AssumeRole" in listed(statement["Action"])
        if allowed and service in services:
            return True
    return False


def pass_role_problems(account: Account, arn: str) -> Iterator[Problem]:
    """Whether who asks may hand the role to SageMaker, by IAM's own policy simulator."""
    kind, _, name = arn.split(":", 5)[5].partition("/")
    if kind == "root":
        return
    iam = account.client("iam")
    if kind == "assumed-role":
        arn = iam.get_role(RoleName=name.partition("/")[0])["Role"]["Arn"]
    passed_to = {
        "ContextKeyName": "iam:PassedToService", "ContextKeyValues": [SERVICE], "ContextKeyType": "string",
    }  # fmt: skip
    answer = iam.simulate_principal_policy(
        PolicySourceArn=arn, ActionNames=["iam:PassRole"], ResourceArns=[account.role], ContextEntries=[passed_to]
    )
    if any(result["EvalDecision"] != "allowed" for result in answer["EvaluationResults"]):
        yield Problem(
            f"{arn} may not pass the role {account.role} to SageMaker",
            "Give it iam:PassRole on that role: docs/aws/launcher.json has the statement",
        )


def secret_problems(account: Account, needed: Iterable[str]) -> Iterator[Problem]:
    """Whether the secret is there, has the form that the container reads, and holds what is needed."""
    names = sorted(needed)
    example = json.dumps(dict.fromkeys(names or ["HF_TOKEN"], "..."))
    if account.secret is None:
        if names:
            yield Problem(
                f"The job needs {' and '.join(names)}, and no secret is named",
                f"`aws secretsmanager create-secret --name llm-engineering --region {account.region} --secret-string "
                f"file://secret.json` with {example} in that file, and SAGEMAKER_SECRET=llm-engineering in .env",
            )
        return
    secrets = account.client("secretsmanager")
    try:
        text = secrets.get_secret_value(SecretId=account.secret).get("SecretString", "")
    except secrets.exceptions.ResourceNotFoundException:
        yield Problem(
            f"There is no secret {account.secret} in {account.region}",
            f"`aws secretsmanager create-secret --name {account.secret} --region {account.region} --secret-string "
            f"file://secret.json` with {example} in that file, or leave SAGEMAKER_SECRET out",
        )
        return
    held = secret_object(text)
    put = f"`aws secretsmanager put-secret-value --secret-id {account.secret} --secret-string file://secret.json`"
    if held is None:
        yield Problem(f"The secret {account.secret} is no JSON object of texts", f"{put} with {example} in that file")
        return
    missing = [name for name in names if not held.get(name)]
    if missing:
        yield Problem(f"The secret {account.secret} lacks {' and '.join(missing)}", f"Add it: {put}")


def listed(value: Any) -> list[Any]:
    """A policy's value, which is a list or one of its items."""
    return value if isinstance(value, list) else [value]


GIB = 2**30
# Two checkpoints are kept (training/run.py), beside the one that is being written.
_CHECKPOINTS = 3
# Data, caches and what the libraries write.
_BESIDES = 10 * GIB


def type_problems(config: SageMakerConfig, account: Account) -> Iterator[Problem]:
    """Whether SageMaker knows the instance types, and the region has them. EC2's list is the one that can be asked."""
    model = get_session().get_service_model("sagemaker")
    known = model.shape_for("TrainingInstanceType").enum
    for instance_type in _types(config):
        if instance_type not in known:
            near = get_close_matches(instance_type, known, n=3)
            hint = f"perhaps {' or '.join(near)} is meant" if near else "https://aws.amazon.com/sagemaker/pricing/"
            yield Problem(f"SageMaker trains on no {instance_type}", f"Correct compute.sagemaker: {hint}")
    asked = {t.removeprefix("ml."): t for t in _types(config) if t in known}
    offered: set[str] = set()
    if asked:
        pages = account.client("ec2").get_paginator("describe_instance_type_offerings")
        for page in pages.paginate(
            LocationType="region", Filters=[{"Name": "instance-type", "Values": sorted(asked)}]
        ):  # fmt: skip
            offered |= {found["InstanceType"] for found in page["InstanceTypeOfferings"]}
    for name, instance_type in asked.items():
        if name not in offered:
            yield Problem(
                f"{account.region} has no {instance_type}",
                "Choose another compute.sagemaker.instance_type, or a region that has it "
                f"(`aws ec2 describe-instance-type-offerings --filters Name=instance-type,Values={name} --region …`)",
            )


def quota_problems(config: SageMakerConfig, account: Account) -> Iterator[Problem]:
    """Whether the account may use as many machines; of fallback types, too small a quota is a warning."""
    use = "spot training" if config.use_spot else "training"
    names = {instance_type: f"{instance_type} for {use} job usage" for instance_type in _types(config)}
    quotas = _quotas("list_service_quotas", account)
    if not set(names.values()) <= quotas.keys():
        # Of a quota that was never changed there may be the default alone.
        quotas = _quotas("list_aws_default_service_quotas", account) | quotas
    for instance_type, name in names.items():
        is_fallback = instance_type != config.instance_type
        if name not in quotas:
            yield Problem(
                f"There is no quota `{name}` in {account.region}: SageMaker does not train on this type there",
                "Choose another type in compute.sagemaker, or another region",
                is_fallback,
            )
            continue
        value, code = quotas[name]
        if value < config.instance_count:
            yield Problem(
                f"The quota `{name}` is {value:.0f}, and {config.instance_count} are asked for",
                f"`aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code {code} "
                f"--desired-value {config.instance_count} --region {account.region}`; an answer takes minutes to days",
                is_fallback,
            )


def _quotas(operation: str, account: Account) -> dict[str, tuple[float, str]]:
    """SageMaker's quotas: value and code by name."""
    pages = account.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker")
    return {found["QuotaName"]: (found["Value"], found["QuotaCode"]) for page in pages for found in page["Quotas"]}


def volume_problems(recipe: Recipe, config: SageMakerConfig, settings: Settings) -> Iterator[Problem]:
    """Whether the disk holds model and checkpoints."""
    needed = volume_bytes(recipe, settings)
    if needed > config.volume_size_gb * GIB:
        yield Problem(
            f"compute.sagemaker.volume_size_gb {config.volume_size_gb} is too small: model, checkpoints and results "
            f"take about {needed / GIB:.0f}",
            f"Set it to {-(-int(needed * 1.2) // GIB)} or more",
        )


def volume_bytes(recipe: Recipe, settings: Settings) -> int:
    """Bytes that a job needs on its disk, from the model's config alone.

    The weights as they are published (their number, counted on a model without content, times the bytes of
    `config.dtype`, bfloat16 where it names none); three checkpoints of 12 bytes for each trained weight (float32, with
    AdamW's two moments); the result in float32; and 10 GiB for data and caches.

    Raises:
        OSError, ValueError: the model's config cannot be had.
    """
    config = load_config(recipe.model, settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        weights: int = sum(parameter.numel() for parameter in model.parameters())
        if recipe.sft.method == "full":
            trained = weights
        else:
            adapted = peft.get_peft_model(model, lora_config(recipe.sft.lora))
            trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    dtype: torch.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    published = weights * dtype.itemsize
    return published + trained * (12 * _CHECKPOINTS + 4) + _BESIDES


def wait_problems(config: SageMakerConfig) -> Iterator[Problem]:
    """Whether the wait for spot machines leaves room for the run."""
    if config.wait_s is not None and config.wait_s < config.max_run_s:
        yield Problem(
            f"compute.sagemaker.max_wait_s {config.wait_s} is less than max_run_s {config.max_run_s}, and counts the "
            "run too: SageMaker refuses that",
            "Raise max_wait_s, or leave it out for twice max_run_s",
        )


def _types(config: SageMakerConfig) -> list[str]:
    return list(dict.fromkeys([config.instance_type, *config.fallback_instance_types]))


_ECR = re.compile(
    r"(?P<registry>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9][a-z0-9._/-]*)(:(?P<tag>[\w.-]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def bucket_problems(account: Account) -> Iterator[Problem]:
    """Whether the bucket is there, in the job's region, and can be written to: an empty object is put below the prefix."""
    s3 = account.client("s3")
    try:
        found = s3.head_bucket(Bucket=account.bucket)
    except ClientError as error:
        region = error.response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if error_code(error) == "404":
            yield Problem(
                f"There is no bucket {account.bucket}", f"`aws s3 mb s3://{account.bucket} --region {account.region}`"
            )
            return
        if not region:
            raise
    else:
        region = found.get("BucketRegion")
    if region and region != account.region:
        yield Problem(
            f"The bucket {account.bucket} is in {region}, and jobs run in {account.region}",
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
            "Give these credentials s3:PutObject there (docs/aws/launcher.json), or look at the bucket's own policy"
            + (f" and that of the key {account.kms_key}" if account.kms_key else ""),
        )


def image_problems(account: Account) -> Iterator[Problem]:
    """Whether the image is in ECR, in the job's region."""
    parts = _ECR.fullmatch(account.image)
    if parts is None:
        yield Problem(
            f"The image {account.image} is no address in Amazon ECR, from where SageMaker takes images",
            "`make image` builds it, pushes it, and says the address for SAGEMAKER_IMAGE",
        )
        return
    if parts["region"] != account.region:
        yield Problem(
            f"The image {account.image} is in {parts['region']}, and jobs run in {account.region}",
            f"Push it there: `make image AWS_REGION={account.region}`",
        )
        return
    ecr = account.client("ecr")
    image = {"imageDigest": parts["digest"]} if parts["digest"] else {"imageTag": parts["tag"] or "latest"}
    try:
        ecr.describe_images(
            registryId=parts["registry"], repositoryName=parts["repository"], imageIds=[image]
        )  # fmt: skip
    except ecr.exceptions.RepositoryNotFoundException:
        yield Problem(
            f"There is no repository {parts['repository']} in ECR in {account.region}", "`make image` makes it"
        )
    except ecr.exceptions.ImageNotFoundException:
        yield Problem(f"The repository {parts['repository']} has no image {account.image}", "`make image` pushes it")


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
    found += wait_problems(config)
    found += _volume_problems(recipe, settings)
    wrong_region = list(region_problems(account.region))
    arn, unknown = (None, wrong_region) if wrong_region else caller(account)
    if arn is None:
        return [*unknown, *found]
    needed = {*secrets, *([_TOKEN] if needs_token else [])}
    return [
        *tried(f"The role {account.role}", partial(role_problems, account, arn)),
        *tried("The right to pass the role", partial(pass_role_problems, account, arn)),
        *tried(f"The bucket {account.bucket}", partial(bucket_problems, account)),
        *tried(f"The image {account.image}", partial(image_problems, account)),
        *tried(f"Whether {account.region} has the machines", partial(type_problems, config, account)),
        *tried("The service quota", partial(quota_problems, config, account)),
        *tried("The secret", partial(secret_problems, account, needed)),
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
        yield from volume_problems(recipe, config, settings)
    except (OSError, ValueError) as error:
        yield Problem(
            f"The size of {recipe.model.name_or_path} is not known: {str(error).splitlines()[0].rstrip('.')}",
            f"Make sure that compute.sagemaker.volume_size_gb {config.volume_size_gb} is enough for it",
            is_warning=True,
        )
