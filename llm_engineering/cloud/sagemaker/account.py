"""The AWS account of the jobs: region, role, bucket and image, from the recipe or the settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.session import Session, get_session

from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.settings import Settings

# Failed requests are repeated after throttling or a lost connection; "standard" is exponential backoff with jitter.
_RETRIES = Config(retries={"mode": "standard", "max_attempts": 8}, connect_timeout=10, read_timeout=60)
# One loader for all sessions: reading the services' models from disk takes longer than a request.
_LOADER = create_loader()
_REGION = re.compile(r"[a-z0-9-]+")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]*")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/.+")
_ECR = re.compile(
    r"(?P<registry>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9][a-z0-9._/-]*)(:(?P<tag>[\w.-]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def botocore_session() -> Session:
    """A new session that shares the models of services with all others."""
    session = get_session()
    session.register_component("data_loader", _LOADER)
    return session


@dataclass(frozen=True)
class Account:
    """The account, and the places in it that jobs use.

    Attributes:
        role: the ARN of the role that a job assumes.
        prefix: the key prefix, without a slash at its end; this project writes only below it.
        image: the address of the image in ECR.
        kms_key: encrypts uploads and the job's results; with None, the bucket's own encryption applies.
        secret: the name of the secret in Secrets Manager that the job reads, if there is one.
    """

    region: str
    role: str
    bucket: str
    prefix: str
    image: str
    kms_key: str | None = None
    secret: str | None = None

    @classmethod
    def resolve(cls, sagemaker: SageMakerConfig, settings: Settings) -> Self:
        """Take each value from the recipe, or from the settings if the recipe does not have it.

        Raises:
            RequestError: values are missing or malformed; the message lists all of them, each with its remedy.
        """
        region = settings.aws_region or boto3.Session().region_name
        role = sagemaker.role or settings.sagemaker_role
        bucket = sagemaker.bucket or settings.sagemaker_bucket
        image = sagemaker.image or settings.sagemaker_image
        problems = []
        if not region:
            problems.append("the region is missing: set AWS_REGION in .env, or `region` in ~/.aws/config")
        elif not _REGION.fullmatch(region):
            problems.append(
                f'the region "{region}" is not the name of a region: set AWS_REGION to one such as eu-west-1'
            )
        if not role:
            problems.append(
                "the job's role is missing: set SAGEMAKER_ROLE in .env to its ARN (docs/aws has its policy)"
            )
        elif not _ROLE.fullmatch(role):
            problems.append(f"the role {role} is not an ARN: set SAGEMAKER_ROLE to arn:aws:iam::<account>:role/<name>")
        if not bucket:
            problems.append("the bucket is missing: set SAGEMAKER_BUCKET in .env to a bucket in that region")
        elif not _BUCKET.fullmatch(bucket):
            problems.append(
                f'the bucket "{bucket}" is not a bucket name, which has small letters, digits, dots and hyphens: leave s3:// '
                "and spaces out, and put folders into compute.sagemaker.prefix"
            )
        if not image:
            problems.append("the image is missing: `make image` builds it, and prints SAGEMAKER_IMAGE for .env")
        if problems:
            raise RequestError("SageMaker cannot be used yet:\n" + "\n".join(f"- {problem}" for problem in problems))
        assert region and role and bucket and image  # noqa: PT018 — for mypy
        prefix = sagemaker.prefix.strip("/")
        return cls(region, role, bucket, prefix, image, sagemaker.kms_key, settings.sagemaker_secret)

    def client(self, service: str) -> Any:
        """A boto3 client for this region. It looks for credentials in the same places as AWS's own tools."""
        session = boto3.Session(botocore_session=botocore_session(), region_name=self.region)
        return session.client(service, config=_RETRIES)

    @property
    def partition(self) -> str:
        """The second part of ARNs, such as `aws`."""
        return self.role.split(":")[1]

    @property
    def number(self) -> str:
        """The account of the job's role: twelve digits."""
        return self.role.split(":")[4]

    @property
    def image_parts(self) -> re.Match[str] | None:
        """The groups `registry`, `region`, `repository`, `tag` and `digest`; None if the image is not in ECR."""
        return _ECR.fullmatch(self.image)

    def uri(self, *parts: str) -> str:
        """An address below the prefix: `s3://bucket/prefix/a/b`."""
        return f"s3://{self.bucket}/{self.key(*parts)}"

    def key(self, *parts: str) -> str:
        """A key below the prefix: `prefix/a/b`."""
        return "/".join((self.prefix, *parts))

    @property
    def encryption(self) -> dict[str, str]:
        """boto3's `ExtraArgs` that encrypt an upload with `kms_key`; empty without a key."""
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key} if self.kms_key else {}
