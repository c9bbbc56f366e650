"""SageMaker on loopback: an account whose training jobs run the container's command, see `tests.fakes.machine`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from llm_engineering.cloud.sagemaker.trust import listed
from tests.fakes.aws import ACCOUNT, REGION, Error, FakeAWS, running_aws
from tests.fakes.job import Job
from tests.fakes.machine import LOG_GROUP, why_no_jobs

__all__ = [
    "ACCOUNT",
    "BUCKET",
    "IMAGE",
    "LOG_GROUP",
    "REGION",
    "ROLE",
    "FakeSageMaker",
    "running_sagemaker",
    "why_no_jobs",
]

BUCKET = "training-bucket"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llm-engineering:training"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/training"


class FakeSageMaker(FakeAWS):
    """An account with a bucket, a role, an image, quotas, and the jobs that were created in it.

    Attributes:
        quotas: applied service quotas by name; a job that exceeds its quota is refused.
        default_quotas: default quotas by name, for quotas that are not among the applied ones.
        fails_to_start: FailureReason by instance type, for jobs that fail after their creation (no capacity, no image).
        no_capacity: names of quotas, for jobs that wait for their machines without an end.
        denied: actions that iam:SimulatePrincipalPolicy denies, as `service:Action`.
        rights: statements of the job's role. With None the simulator allows every action of it that is not denied.
        prices: invented prices of training in US dollars an hour, by instance type.
        environment: variables of the jobs, besides those of SageMaker and of the request.
        starting_s: seconds until a job gets its machines.
        grace_s: seconds from SIGTERM to SIGKILL; SageMaker's are 120.
        jobs: the jobs by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quotas: dict[str, float] = {
            f"{kind} for {use} job usage": 4.0
            for kind in ("ml.g5.xlarge", "ml.g5.2xlarge", "ml.p4d.24xlarge")
            for use in ("training", "spot training")
        } | {"Longest run time for a training job": 432_000.0}
        self.default_quotas: dict[str, float] = {}
        self.fails_to_start: dict[str, str] = {}
        self.no_capacity: set[str] = set()
        self.denied: set[str] = set()
        self.rights: list[dict[str, Any]] | None = None
        self.prices = {"ml.g5.xlarge": 1.0, "ml.g5.2xlarge": 2.0}
        self.environment: dict[str, str] = {}
        self.starting_s = 0.0
        self.grace_s = 20.0
        self.jobs: dict[str, Job] = {}

    def env(self, principal: str = "launcher") -> dict[str, str]:
        """The environment variables with which a command uses this account."""
        key, secret = self.credentials(principal)
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "SAGEMAKER_ROLE": ROLE, "SAGEMAKER_BUCKET": BUCKET,
            "SAGEMAKER_IMAGE": IMAGE,
        }  # fmt: skip

    def job(self, name: str) -> Job:
        """A job by its name, or by a part of the name that is unique."""
        (found,) = [job for job in self.jobs.values() if job.name == name] or [
            job for job in self.jobs.values() if name in job.name
        ]
        return found

    def objects(self, prefix: str = "") -> list[str]:
        """The keys of the bucket's objects with this prefix."""
        pages = self.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def interrupt(self, name: str, graceful: bool = True) -> None:
        """Take the machines of a spot job away; it starts again with its checkpoints.

        With `graceful`, the job gets SIGTERM and its last checkpoints are kept. Otherwise files that were not copied yet
        are lost.
        """
        self.job(name).orders.put("interrupt" if graceful else "kill")

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name, resources = asked["TrainingJobName"], asked["ResourceConfig"]
        if name in self.jobs:
            raise Error("ResourceInUse", "Training job names must be unique within an AWS account and region")
        spot, wait = (
            asked.get("EnableManagedSpotTraining", False),
            asked["StoppingCondition"].get("MaxWaitTimeInSeconds"),
        )
        if wait is not None and not spot:
            raise Error("ValidationException", "MaxWaitTimeInSeconds is for managed spot training only")
        if spot and resources.get("KeepAlivePeriodInSeconds"):
            raise Error("ValidationException", "Managed spot training does not support warm pools")
        if spot and (wait or 0) < asked["StoppingCondition"].get("MaxRuntimeInSeconds", 86_400):
            raise Error("ValidationException", "MaxWaitTimeInSeconds must be at least MaxRuntimeInSeconds")
        kind, count = resources["InstanceType"], resources["InstanceCount"]
        quota = f"{kind} for {'spot ' if spot else ''}training job usage"
        running = [j for j in self.jobs.values() if j.status == "InProgress" and j.quota == quota]
        used = sum(j.request["ResourceConfig"]["InstanceCount"] for j in running)
        if used + count > self.quotas.get(quota, 0):
            raise Error(
                "ResourceLimitExceeded",
                f"The account-level service limit '{quota}' is {self.quotas.get(quota, 0):.0f} Instances, with current "
                f"utilization of {used} Instances and a request delta of {count} Instances. Please use AWS Service "
                "Quotas to request an increase for this quota.",
            )
        self.jobs[name] = job = Job(self, asked, quota)
        job.thread.start()
        return {"TrainingJobArn": job.arn}

    def _find(self, asked: dict[str, Any]) -> Job:
        name = asked["TrainingJobName"]
        if name not in self.jobs:
            raise Error("ValidationException", "Requested resource not found.")
        return self.jobs[name]

    def _stop(self, asked: dict[str, Any]) -> dict[str, Any]:
        job = self._find(asked)
        if job.status != "InProgress":
            raise Error(
                "ValidationException",
                f"The request was rejected because the training job is in status {job.status}.",
            )
        job.go("Stopping")
        job.status = "Stopping"
        job.orders.put("stop")
        return {}

    def _list(self, asked: dict[str, Any]) -> dict[str, Any]:
        part, status = asked.get("NameContains", ""), asked.get("StatusEquals")
        after = asked.get("CreationTimeAfter", 0)
        found = [
            j for j in self.jobs.values() if part in j.name and status in (None, j.status) and j.created > after
        ]  # fmt: skip
        if asked.get("SortOrder", "Ascending") == "Descending":
            found.reverse()
        start, size = int(asked.get("NextToken", 0)), asked.get("MaxResults", 10)
        page: dict[str, Any] = {"TrainingJobSummaries": [j.summary() for j in found[start : start + size]]}
        return page | ({"NextToken": str(start + size)} if start + size < len(found) else {})

    def _add_tags(self, asked: dict[str, Any]) -> dict[str, Any]:
        (job,) = [job for job in self.jobs.values() if job.arn == asked["ResourceArn"]]
        names = {tag["Key"] for tag in asked["Tags"]}
        job.request["Tags"] = [t for t in job.request.get("Tags", []) if t["Key"] not in names] + asked["Tags"]
        return {"Tags": job.request["Tags"]}

    @staticmethod
    def _list_quotas(listed: dict[str, float], asked: dict[str, Any]) -> dict[str, Any]:
        quotas = [
            {"ServiceCode": "sagemaker", "QuotaName": name, "QuotaCode": f"L-{i:08X}", "Value": value,
             "Adjustable": True} for i, (name, value) in enumerate(listed.items())
        ]  # fmt: skip
        # Short pages reveal a caller that reads only the first page.
        start = int(asked.get("NextToken", 0))
        page: dict[str, Any] = {"Quotas": quotas[start : start + 2]}
        return page | ({"NextToken": str(start + 2)} if start + 2 < len(quotas) else {})

    def _products(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The price list's answer, in which training is not the first use of a machine."""
        values = {each["Field"]: each["Value"] for each in asked["Filters"]}
        kind, price = values["instanceName"], self.prices.get(values["instanceName"])
        found = []
        for number, use in enumerate(["Notebk", "Host", "Train", "Processing"] if price is not None else []):
            sku = f"FAKE{number:012d}"
            attributes = {
                "servicecode": "AmazonSageMaker", "regionCode": values["regionCode"], "instanceName": kind,
                "locationType": "AWS Region", "operation": "RunInstance", "usagetype": f"EU-{use}:{kind}",
            }  # fmt: skip
            dimension = {
                "unit": "Hrs", "beginRange": "0", "endRange": "Inf", "description": f"{kind} {use}",
                "pricePerUnit": {"USD": f"{price if use == 'Train' else 99.0:.10f}"},
            }  # fmt: skip
            term = {"sku": sku, "priceDimensions": {f"{sku}.JRTCKXETXF.6YS6EN2CT7": dimension}, "termAttributes": {}}
            product = {"sku": sku, "productFamily": "ML Instance", "attributes": attributes}
            terms = {"OnDemand": {f"{sku}.JRTCKXETXF": term}}
            found.append(json.dumps({"product": product, "serviceCode": "AmazonSageMaker", "terms": terms}))
        # Short pages reveal a caller that reads only the first page.
        start = int(asked.get("NextToken", 0))
        page: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": found[start : start + 2]}
        return page | ({"NextToken": str(start + 2)} if start + 2 < len(found) else {})

    def _simulate(self, asked: dict[str, Any]) -> str:
        rights = self.rights if asked["PolicySourceArn"] == ROLE else None

        def decide(action: str, resource: str) -> str:
            has_right = rights is None or any(
                action in listed(statement["Action"])
                and any(fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
                for statement in rights
            )
            return "allowed" if has_right and action not in self.denied else "implicitDeny"

        results = "".join(
            f"<member><EvalActionName>{action}</EvalActionName><EvalResourceName>{resource}</EvalResourceName>"
            f"<EvalDecision>{decide(action, resource)}</EvalDecision></member>"
            for action in asked["ActionNames"]
            for resource in asked.get("ResourceArns") or ["*"]
        )
        return f"<EvaluationResults>{results}</EvaluationResults><IsTruncated>false</IsTruncated>"

    def set_up(self) -> None:
        """Create the parts of an account without problems, and answer for SageMaker, Service Quotas and the policy simulator."""
        trust = {
            "Version": "2012-10-17",
            "Statement": [
                {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
            ],
        }
        iam, ecr = self.client("iam"), self.client("ecr")
        iam.create_role(RoleName="training", AssumeRolePolicyDocument=json.dumps(trust))
        iam.create_user(UserName="launcher")
        made = iam.create_access_key(UserName="launcher")["AccessKey"]
        self.keys["launcher"] = (made["AccessKeyId"], made["SecretAccessKey"])
        self.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        ecr.create_repository(repositoryName="llm-engineering")
        ecr.put_image(repositoryName="llm-engineering", imageTag="training", imageManifest=json.dumps(_MANIFEST))
        self.answers |= {
            ("sagemaker", "CreateTrainingJob"): self._create,
            ("sagemaker", "DescribeTrainingJob"): lambda asked: self._find(asked).described(),
            ("sagemaker", "StopTrainingJob"): self._stop,
            ("sagemaker", "ListTrainingJobs"): self._list,
            ("sagemaker", "ListTags"): lambda asked: {
                "Tags": next(j for j in self.jobs.values() if j.arn == asked["ResourceArn"]).request.get("Tags", [])
            },
            ("sagemaker", "AddTags"): self._add_tags,
            ("servicequotas", "ListServiceQuotas"): lambda asked: self._list_quotas(self.quotas, asked),
            ("servicequotas", "ListAWSDefaultServiceQuotas"): lambda asked: self._list_quotas(
                self.default_quotas, asked
            ),
            ("pricing", "GetProducts"): self._products,
            ("iam", "SimulatePrincipalPolicy"): self._simulate,
        }


_MANIFEST = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 1, "digest": f"sha256:{0:064}"},
    "layers": [],
}


@contextmanager
def running_sagemaker() -> Iterator[FakeSageMaker]:
    """Serve an account until the block ends. Then jobs that still run are killed, and invalid requests fail the test."""
    with running_aws(FakeSageMaker()) as fake:
        fake.set_up()
        try:
            yield fake
        finally:
            for job in fake.jobs.values():
                job.orders.put("end")
            for job in fake.jobs.values():
                job.thread.join()
    assert not fake.invalid, fake.invalid
