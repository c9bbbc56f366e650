"""Checks of who asks and who works: credentials, the job's role and its trust, pass-role, and the secret."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from llm_engineering.compute.container import secret_object
from llm_engineering.compute.sagemaker.account import Account
from llm_engineering.compute.sagemaker.problems import Problem, error_code

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
