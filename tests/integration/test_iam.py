"""The policies of docs/aws allow what is asked of AWS, and no more."""

import json

import pytest
from botocore.session import get_session

from llm_engineering.compute.sagemaker.account import Account
from llm_engineering.compute.sagemaker.code import upload_code
from llm_engineering.compute.sagemaker.preflight import problems
from llm_engineering.recipes import load_recipe
from llm_engineering.settings import Settings
from tests.conftest import ROOT
from tests.fake_aws import ACCOUNT, REGION, Request
from tests.fake_sagemaker import BUCKET, ROLE, why_no_jobs
from tests.iam import actions, assert_allowed, policy
from tests.integration.test_sagemaker import Stage, fake, model, stage  # noqa: F401

needs_jobs = pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))

# What is not asked in the test below, and why it is allowed all the same.
LAUNCHER_UNTESTED = {
    "ecr:GetAuthorizationToken": "docker's login, for make image",
    "ecr:BatchCheckLayerAvailability": "docker push",
    "ecr:CompleteLayerUpload": "docker push",
    "ecr:InitiateLayerUpload": "docker push",
    "ecr:PutImage": "docker push",
    "ecr:UploadLayerPart": "docker push",
    "ecr:CreateRepository": "make image",
    "ecr:DescribeRepositories": "make image",
    "s3:AbortMultipartUpload": "boto3, where a large upload fails",
    "s3:DeleteObject": "ZenML, where it replaces or deletes artifacts in its S3 store",
    "sagemaker:StopTrainingJob": "Ctrl-C",
    "sagemaker:ListTags": "a second run of the same work, and --attach",
}
JOB_UNTESTED = {
    "s3:AbortMultipartUpload": "SageMaker, where a large upload fails",
    "logs:DescribeLogStreams": "SageMaker, as its documentation lists for execution roles",
    "cloudwatch:PutMetricData": "SageMaker, load of processor and card",
    "ecr:BatchCheckLayerAvailability": "SageMaker pulls the image",
    "ecr:BatchGetImage": "SageMaker pulls the image",
    "ecr:GetDownloadUrlForLayer": "SageMaker pulls the image",
    "ecr:GetAuthorizationToken": "SageMaker pulls the image",
}


@needs_jobs
def test_a_dispatched_job_and_its_checks_need_what_the_policies_allow(fake, stage, small_llama, monkeypatch):  # noqa: F811
    fake.client("secretsmanager").create_secret(Name="llm", SecretString="{}")
    monkeypatch.setenv("SAGEMAKER_SECRET", "llm")
    block = "compute={target: sagemaker, sagemaker: {instance_type: ml.g5.xlarge}}"
    recipe = load_recipe(ROOT / "configs" / "local.yaml", [f"model.name_or_path={small_llama}", block])
    account = Account.resolve(recipe.compute.sagemaker, Settings())
    assert problems(recipe, account, Settings()) == []
    stage.settings = Settings(llm_output_dir=stage.settings.llm_output_dir)
    stage.dispatch()
    upload_code(account)
    launcher, job = policy("launcher"), policy("job")
    assert actions(launcher) - assert_allowed(fake.requests, "launcher", launcher) == set(LAUNCHER_UNTESTED)
    assert actions(job) - assert_allowed(fake.requests, "job", job) == set(JOB_UNTESTED)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "aws").glob("*.json")), ids=lambda path: path.stem)
def test_policies_name_each_action_of_a_service_that_is_there(path):
    known = {name: get_session().get_service_model(name) for name in ("sagemaker", "logs", "ecr", "scheduler")}
    for statement in json.loads(path.read_text())["Statement"]:
        listed = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert listed == sorted(listed) or len(listed) < 3
        for action in listed:
            service, _, operation = action.partition(":")
            assert "*" not in action
            assert statement["Effect"] == "Allow"
            if service in known:
                assert operation in known[service].operation_names, action


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


def test_the_launcher_may_pass_the_role_to_sagemaker_alone():
    (statement,) = [s for s in policy("launcher") if s["Action"] == "iam:PassRole"]
    assert statement["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    assert statement["Resource"] == f"arn:aws:iam::{ACCOUNT}:role/training"
