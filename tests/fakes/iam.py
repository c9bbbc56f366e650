"""Checks that an IAM policy of docs/aws allows the recorded requests."""

import json
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from tests.conftest import ROOT
from tests.fakes.aws import ACCOUNT, REGION, Request
from tests.fakes.sagemaker import BUCKET, ROLE

PLACES = {
    "ACCOUNT": ACCOUNT, "REGION": REGION, "BUCKET": BUCKET, "JOB_ROLE_ARN": ROLE, "SECRET": "llm",
    "REPOSITORY": "llm-engineering", "SECRET_KMS_KEY_ARN": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/2",
    "KMS_KEY_ARN": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1", "SCHEDULER_ROLE_ARN": f"arn:aws:iam::{ACCOUNT}:role/scheduler", "TOPIC_ARN": f"arn:aws:sns:{REGION}:{ACCOUNT}:retraining",
}  # fmt: skip


class Need(NamedTuple):
    """A permission that a request needs: IAM's action on a resource, with the condition keys of the request."""

    action: str
    resource: str
    context: dict[str, str]


def policy(name: str, **places: str) -> list[dict[str, Any]]:
    """The statements of docs/aws/<name>.json; the placeholders are replaced, by default with the fake account's values."""
    text = (ROOT / "docs" / "aws" / f"{name}.json").read_text()
    for place, value in {**PLACES, **places}.items():
        text = text.replace(f"<{place}>", value)
    assert not re.findall(r"<[A-Z_]+>", text), f"placeholders of {name}.json that are not replaced"
    statements: list[dict[str, Any]] = json.loads(text)["Statement"]
    return statements


def actions(statements: list[dict[str, Any]]) -> set[str]:
    """All actions that a policy allows."""
    return {action for statement in statements for action in _listed(statement["Action"])}


def assert_allowed(requests: Iterable[Request], principal: str, statements: list[dict[str, Any]]) -> set[str]:
    """Assert that the statements allow each request of the principal; returns the needed actions."""
    used = set()
    for request in requests:
        if request.principal != principal:
            continue
        for need in needs(request):
            assert any(_allows(statement, need) for statement in statements), f"{principal} is not allowed {need}"
            used.add(need.action)
    return used


def needs(request: Request) -> Iterator[Need]:
    """The permissions that a request needs; actions have the names of the Service Authorization Reference."""
    service, operation, asked = request.service, request.operation, request.parameters
    if (service, operation) == ("sts", "GetCallerIdentity"):
        return  # needs no permission
    if service == "s3":
        bucket, key = f"arn:aws:s3:::{asked['Bucket']}", asked.get("Key")
        if operation == "DeleteObjects":  # the keys are in the body, which is not recorded
            key = "*"
        yield Need(f"s3:{_S3.get(operation, operation)}", bucket if key is None else f"{bucket}/{key}", {})
        return
    context: dict[str, str] = {}
    yield Need(f"{_PREFIXES.get(service, service)}:{operation}", _resource(request), context)
    if operation in ("CreateTrainingJob", "CreateModel"):
        role = asked.get("RoleArn") or asked["ExecutionRoleArn"]
        yield Need("iam:PassRole", role, {"iam:PassedToService": "sagemaker.amazonaws.com"})
    if "TrainingPlanArn" in asked.get("ResourceConfig", ()):
        yield Need("sagemaker:CreateTrainingJob", asked["ResourceConfig"]["TrainingPlanArn"], context)
    if operation in ("CreateTrainingJob", "CreateEndpoint") and asked.get("Tags"):
        yield Need("sagemaker:AddTags", _resource(request), context)
    if service == "scheduler" and "Target" in asked:
        yield Need("iam:PassRole", asked["Target"]["RoleArn"], {"iam:PassedToService": "scheduler.amazonaws.com"})


# Services that sign with a name other than IAM's.
_PREFIXES = {"monitoring": "cloudwatch"}
_S3 = {
    "HeadBucket": "ListBucket", "ListObjects": "ListBucket", "ListObjectsV2": "ListBucket", "HeadObject": "GetObject",
    "CreateMultipartUpload": "PutObject", "UploadPart": "PutObject", "CompleteMultipartUpload": "PutObject",
    "DeleteObjects": "DeleteObject",
}  # fmt: skip


# The kind of resource of each operation on the parts of an endpoint, and the parameter with its name.
_ENDPOINT_PARTS = {
    f"{verb}{part}": (kind, f"{part}Name")
    for part, kind in (
        ("Endpoint", "endpoint"), ("EndpointConfig", "endpoint-config"), ("Model", "model"),
        ("ModelPackage", "model-package"), ("ModelPackageGroup", "model-package-group"),
    )
    for verb in ("Create", "Delete", "Describe", "Update")
    if (verb, part) != ("Create", "ModelPackage")
} | {"CreateModelPackage": ("model-package", "ModelPackageGroupName")}  # fmt: skip


def _resource(request: Request) -> str:
    """The resource of a request; `*` for operations that have none."""
    asked, here = request.parameters, f"{request.region}:{ACCOUNT}"
    match request.service:
        case "sagemaker" if request.operation in _ENDPOINT_PARTS:
            kind, key = _ENDPOINT_PARTS[request.operation]
            name = asked[key].partition(":model-package/")[2] or asked[key]
            return f"arn:aws:sagemaker:{here}:{kind}/{name.lower()}"
        case "sagemaker" if "TrainingJobName" in asked:
            return f"arn:aws:sagemaker:{here}:training-job/{asked['TrainingJobName']}"
        case "sagemaker":
            return asked.get("ResourceArn", "*")
        case "logs":
            stream = f":log-stream:{asked['logStreamName']}" if "logStreamName" in asked else ""
            return f"arn:aws:logs:{here}:log-group:{asked['logGroupName']}{stream}"
        case "iam":
            return asked.get("PolicySourceArn") or f"arn:aws:iam::{ACCOUNT}:role/{asked['RoleName']}"
        case "ecr":
            return f"arn:aws:ecr:{here}:repository/{asked['repositoryName']}"
        case "secretsmanager":
            return f"arn:aws:secretsmanager:{here}:secret:{asked['SecretId']}-AbCdEf"
        case "scheduler" if request.operation.endswith("ScheduleGroup"):
            return f"arn:aws:scheduler:{here}:schedule-group/{asked['Name']}"
        case "events":
            return f"arn:aws:events:{here}:rule/{asked.get('Rule') or asked['Name']}"
        case "monitoring" if request.operation != "DescribeAlarms":
            return f"arn:aws:cloudwatch:{here}:alarm:{asked.get('AlarmName') or asked['AlarmNames'][0]}"
        case "scheduler":
            group = asked.get("GroupName") or ""
            return f"arn:aws:scheduler:{here}:schedule/{group}/{asked.get('Name', '*')}" if group else "*"
        case "sns":
            return asked.get("TopicArn", "*")
    return "*"


def _allows(statement: dict[str, Any], need: Need) -> bool:
    if statement["Effect"] != "Allow" or need.action not in _listed(statement["Action"]):
        return False
    if not any(fnmatchcase(need.resource, pattern) for pattern in _listed(statement["Resource"])):
        return False
    conditions = statement.get("Condition", {}).get("StringEquals", {})
    return all(need.context.get(name) == value for name, value in conditions.items())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
