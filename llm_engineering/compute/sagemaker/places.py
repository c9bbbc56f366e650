"""Checks of what a job reads and writes: the bucket and the image."""

from __future__ import annotations

import re
from collections.abc import Iterator

from botocore.exceptions import ClientError

from llm_engineering.compute.sagemaker.account import Account
from llm_engineering.compute.sagemaker.problems import FORBIDDEN, Problem, error_code

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
