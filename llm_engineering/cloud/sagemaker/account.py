"""The AWS account that jobs run in: region, role, bucket and image, from the recipe or the settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.session import get_session

from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.settings import Settings

# Throttling and lost connections are tried again; "standard" waits exponentially with jitter between attempts.
_RETRIES = Config(retries={"mode": "standard", "max_attempts": 8}, connect_timeout=10, read_timeout=60)
_LOADER = create_loader()
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/.+")


@dataclass(frozen=True)
class Account:
    """Where jobs run and what they read and write.

    Attributes:
        role: the ARN of the role that a job takes on.
        prefix: below it is everything in the bucket that this project makes; without a slash at its end.
        image: the address of the image in ECR.
        kms_key: encrypts what is uploaded, and the job's results; None leaves it to the bucket.
        secret: the name of the secret in Secrets Manager that the job reads; None for none.
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
        """The recipe's values, else the settings'.

        Raises:
            RequestError: some are missing or malformed; all of them are named, each with its remedy.
        """
        region = settings.aws_region or boto3.Session().region_name
        role = sagemaker.role or settings.sagemaker_role
        bucket = sagemaker.bucket or settings.sagemaker_bucket
        image = sagemaker.image or settings.sagemaker_image
        problems = []
        if not region:
            problems.append("no region is known: set AWS_REGION in .env, or `region` in ~/.aws/config")
        if not role:
            problems.append(
                "no role for the job is known: set SAGEMAKER_ROLE to its ARN in .env (docs/aws has its policy)"
            )
        elif not _ROLE.fullmatch(role):
            problems.append(f"the role {role} is no ARN: set SAGEMAKER_ROLE to arn:aws:iam::<account>:role/<name>")
        if not bucket:
            problems.append("no bucket is known: set SAGEMAKER_BUCKET in .env to one in that region")
        elif "/" in bucket:
            problems.append(f"the bucket {bucket} is no name: leave s3:// out, and put folders in sagemaker.prefix")
        if not image:
            problems.append(
                "no image is known: `make image` builds it and says its address for SAGEMAKER_IMAGE in .env"
            )
        if problems:
            raise RequestError("SageMaker cannot be used yet:\n" + "\n".join(f"- {problem}" for problem in problems))
        assert region
        assert role
        assert bucket
        assert image
        prefix = sagemaker.prefix.strip("/")
        return cls(region, role, bucket, prefix, image, sagemaker.kms_key, settings.sagemaker_secret)

    def client(self, service: str) -> Any:
        """A boto3 client of this region that tries again what may pass; credentials are found as AWS's tools do."""
        session = get_session()
        # Reading the services' models takes longer than asking: once for all clients, not for each session.
        session.register_component("data_loader", _LOADER)
        return boto3.Session(botocore_session=session, region_name=self.region).client(service, config=_RETRIES)

    def uri(self, *parts: str) -> str:
        """The address of a place below the prefix: `s3://bucket/prefix/a/b`."""
        return f"s3://{self.bucket}/{self.key(*parts)}"

    def key(self, *parts: str) -> str:
        """The key of a place below the prefix: `prefix/a/b`."""
        return "/".join((self.prefix, *parts))

    @property
    def encryption(self) -> dict[str, str]:
        """What an upload says of its encryption: boto3's `ExtraArgs`."""
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key} if self.kms_key else {}
