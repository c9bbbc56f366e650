"""Checks with IAM's policy simulator what the caller may do with the job's role, and what the role itself may do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.problems import POLICIES, Problem
from llm_engineering.cloud.sagemaker.trust import put_policy
from llm_engineering.recipe.compute_blocks import SageMakerConfig

SAGEMAKER = "sagemaker.amazonaws.com"
# Each action of docs/aws/job-vpc.json applies to all resources.
_NETWORK = ("ec2:CreateNetworkInterface", "ec2:DeleteNetworkInterface", "ec2:DescribeSubnets", "ec2:DescribeVpcs")


class _Need(NamedTuple):
    """Actions of the job on one resource, and the policy in docs/aws that allows them."""

    actions: Sequence[str]
    resource: str
    policy: str = "job"
    is_warning: bool = False


def right_problems(config: SageMakerConfig, account: Account, caller: str) -> Iterator[Problem]:
    """Check that the caller may pass the role to SageMaker, and that the role may do what a job needs."""
    iam = account.client("iam")
    yield from _pass_role_problems(iam, account, caller)
    # The other account's simulator cannot be asked.
    if caller.split(":")[4] != account.number:
        return
    for need in _needs(config, account):
        try:
            denied = _denied(iam, account.role, need.actions, need.resource)
        except iam.exceptions.NoSuchEntityException:
            # Reported with the role's trust policy.
            return
        if denied:
            name = account.role.rpartition("/")[2]
            yield Problem(
                f"The role {name} may not do {' and '.join(denied)} on {need.resource}",
                f"Run `{put_policy(name, need.policy)}`",
                need.is_warning,
            )
    yield from _key_problems(iam, account)


def _needs(config: SageMakerConfig, account: Account) -> Iterator[_Need]:
    start, here = f"arn:{account.partition}", f"{account.region}:{account.number}"
    bucket = f"{start}:s3:::{account.bucket}"
    yield _Need(["s3:ListBucket"], bucket)
    checkpoints = f"{bucket}/{account.key('checkpoints', 'job', 'file')}"
    yield _Need(["s3:GetObject", "s3:PutObject"], checkpoints)
    # Without this right, only old checkpoints stay in the bucket.
    yield _Need(["s3:DeleteObject"], checkpoints, is_warning=True)
    log = f"{start}:logs:{here}:log-group:/aws/sagemaker/TrainingJobs:log-stream:job/algo-1"
    yield _Need(["logs:CreateLogStream", "logs:PutLogEvents"], log)
    if account.image_parts is not None:
        registry, region, repository = (account.image_parts[part] for part in ("registry", "region", "repository"))
        yield _Need(["ecr:GetAuthorizationToken"], "*")
        pull = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
        yield _Need(pull, f"{start}:ecr:{region}:{registry}:repository/{repository}")
    if account.secret is not None:
        # Six random characters end the ARN of a secret.
        yield _Need(["secretsmanager:GetSecretValue"], f"{start}:secretsmanager:{here}:secret:{account.secret}-AbCdEf")
    if config.vpc is not None:
        yield _Need(_NETWORK, "*", "job-vpc")


def _key_problems(iam: Any, account: Account) -> Iterator[Problem]:
    """Check the keys of the uploads and of the secret. The key's own policy, which is not checked, may allow more."""
    keys = {}
    if account.kms_key is not None:
        keys["compute.sagemaker.kms_key"] = (account.kms_key, ["kms:Decrypt", "kms:GenerateDataKey"])
    if account.secret is not None:
        secrets = account.client("secretsmanager")
        try:
            key = secrets.describe_secret(SecretId=account.secret).get("KmsKeyId")
        except secrets.exceptions.ResourceNotFoundException:
            key = None
        # Every role of the account may use AWS's own key through Secrets Manager.
        if key and not key.endswith("alias/aws/secretsmanager"):
            keys[f"the secret {account.secret}"] = (key, ["kms:Decrypt"])
    for subject, (key, actions) in keys.items():
        kms = account.client("kms")
        try:
            described = kms.describe_key(KeyId=key)["KeyMetadata"]
        except kms.exceptions.NotFoundException:
            yield Problem(f"There is no key {key}, which {subject} names", "Name a key of this account and region")
            continue
        if described["KeyState"] != "Enabled":
            yield Problem(
                f"The key {key} of {subject} is {described['KeyState']}", f"Run `aws kms enable-key --key-id {key}`"
            )
        denied = _denied(iam, account.role, actions, described["Arn"])
        if denied:
            name = account.role.rpartition("/")[2]
            statement = {"Effect": "Allow", "Action": denied, "Resource": described["Arn"]}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            yield Problem(
                f"The role {name} may not do {' and '.join(denied)} with the key of {subject}",
                f"Unless the key's own policy allows it, run `aws iam put-role-policy --role-name {name} --policy-name "
                f"llm-engineering-key-{described['KeyId']} --policy-document '{policy}'`",
                is_warning=True,
            )


def _pass_role_problems(iam: Any, account: Account, caller: str) -> Iterator[Problem]:
    kind, _, name = caller.split(":", 5)[5].partition("/")
    if kind == "root":
        return
    if kind == "assumed-role":
        # The simulator accepts a role, but not a session of a role.
        caller = iam.get_role(RoleName=name.partition("/")[0])["Role"]["Arn"]
    if _denied(iam, caller, ["iam:PassRole"], account.role, {"iam:PassedToService": SAGEMAKER}):
        yield Problem(
            f"{caller} may not pass the role {account.role} to SageMaker",
            f"Allow it iam:PassRole on that role: {POLICIES}/launcher.json has the statement",
        )


def _denied(
    iam: Any, principal: str, actions: Sequence[str], resource: str, context: Mapping[str, str] | None = None
) -> list[str]:
    """The actions that the policies of a principal do not allow on a resource."""
    entries = [
        {"ContextKeyName": name, "ContextKeyValues": [value], "ContextKeyType": "string"}
        for name, value in (context or {}).items()
    ]
    answer = iam.simulate_principal_policy(
        PolicySourceArn=principal, ActionNames=actions, ResourceArns=[resource], ContextEntries=entries
    )
    return [found["EvalActionName"] for found in answer["EvaluationResults"] if found["EvalDecision"] != "allowed"]
