"""The limits of the policies in docs/aws. The tests of jobs and schedules check that they allow enough."""

import json

import pytest
from botocore.session import get_session

from tests.conftest import ROOT
from tests.fakes.aws import ACCOUNT, REGION, Request
from tests.fakes.iam import assert_allowed, policy
from tests.fakes.sagemaker import BUCKET, ROLE


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "aws").glob("*.json")), ids=lambda path: path.stem)
def test_policies_name_existing_actions_without_wildcards(path):
    models = {name: [name] for name in ("logs", "ecr", "scheduler")} | {"sagemaker": ["sagemaker", "sagemaker-runtime"]}
    known = {
        name: {one for model in several for one in get_session().get_service_model(model).operation_names}
        for name, several in models.items()
    }
    for statement in json.loads(path.read_text())["Statement"]:
        listed = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert listed == sorted(listed) or len(listed) < 3
        for action in listed:
            service, _, operation = action.partition(":")
            assert "*" not in action
            assert statement["Effect"] == "Allow"
            if service in known:
                assert operation in known[service], action


@pytest.mark.parametrize(
    ("service", "operation", "asked"),
    [
        ("s3", "PutObject", {"Bucket": "another-bucket", "Key": "a"}),
        ("s3", "DeleteBucket", {"Bucket": BUCKET}),
        ("sagemaker", "CreateTrainingJob", {"TrainingJobName": "a", "RoleArn": ROLE + "-of-an-administrator"}),
        ("sagemaker", "CreateEndpoint", {"EndpointName": "a"}),
        ("secretsmanager", "GetSecretValue", {"SecretId": "another"}),
        ("iam", "PassRole", {"RoleName": "another"}),
    ],
)
def test_other_requests_are_not_allowed(service, operation, asked):
    with pytest.raises(AssertionError, match="launcher is not allowed"):
        assert_allowed([Request("launcher", service, operation, asked, REGION)], "launcher", policy("launcher"))


def test_policies_are_short_enough_for_iam():
    """IAM counts characters without white space: at most 6,144 in a policy, and 10,240 in all inline policies of a role."""
    sizes = {path.stem: len("".join(path.read_text().split())) for path in (ROOT / "docs" / "aws").glob("*.json")}
    # The values that replace the placeholders are longer than the placeholders.
    assert all(size < 5000 for size in sizes.values())
    assert (
        sum(size for name, size in sizes.items() if name in ("job", "job-schedules", "job-vpc", "kms", "secret-kms"))
        < 8000
    )


@pytest.mark.parametrize("principal", ["launcher", "scheduler"])
def test_a_job_may_use_a_training_plan(principal):
    plan = {"TrainingPlanArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-plan/spring"}
    asked = {"TrainingJobName": "weekly--1", "RoleArn": ROLE, "ResourceConfig": plan}
    assert_allowed([Request(principal, "sagemaker", "CreateTrainingJob", asked, REGION)], principal, policy(principal))


def test_the_launcher_may_pass_the_role_only_to_sagemaker():
    (statement,) = [s for s in policy("launcher") if s["Action"] == "iam:PassRole"]
    assert statement["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    assert statement["Resource"] == f"arn:aws:iam::{ACCOUNT}:role/training"
