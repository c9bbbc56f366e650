"""What went wrong with a job, or with asking for one, as a sentence and a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from llm_engineering.errors import RequestError, WorkError

# Of FailureReason: what a pattern in it means, and what helps. The first are SageMaker's own words for what kept the job
# from running, the others the end of a job that did run.
_Meaning = tuple[re.Pattern[str], str, str]
_CAPACITY: _Meaning = (
    re.compile(r"CapacityError|insufficient capacity|Unable to provision", re.IGNORECASE),
    "Amazon has no free machine of the type {type}{spot}.",
    "Name other types in compute.sagemaker.fallback_instance_types, try again later, or in another region{on_demand}.",
)
_NOT_RUN: tuple[_Meaning, ...] = (
    _CAPACITY,
    (
        re.compile(r"image", re.IGNORECASE),
        "The image {image} could not be pulled.",
        "`make image` builds and pushes it; it has to be in the job's region, and the job's role needs ecr:BatchGetImage "
        "and ecr:GetDownloadUrlForLayer; in a VPC without internet also endpoints of ECR and S3.",
    ),
    (
        re.compile(r"AccessDenied|not authorized|Forbidden|403", re.IGNORECASE),
        "The job's role lacks a permission.",
        "Compare {role} with docs/aws: it has to read and write {bucket}.",
    ),
)
_RUN: tuple[_Meaning, ...] = (
    (
        re.compile(r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC"),
        "The card's memory did not suffice.",
        "Lower per_device_train_batch_size or formatting.max_length, set gradient_checkpointing, or take a type with a "
        "larger card than {type}'s.",
    ),
    (
        re.compile(r"exit code: 137|SIGKILL|instance type with more memory"),
        "The machine's memory did not suffice: the training process was killed.",
        "Take a type with more memory than {type}, or lower compute.num_processes.",
    ),
    (
        re.compile(r"No space left on device"),
        "The job's volume of {volume} GB is full.",
        "Raise compute.sagemaker.volume_size_gb: base model, checkpoints and results stand on it together.",
    ),
)
# Codes with which AWS refuses a request, and what helps.
_CODES = {
    "ResourceLimitExceeded": "Ask for a higher quota (`make preflight` says the command), or name other types in "
    "compute.sagemaker.fallback_instance_types.",
    "AccessDenied": "Give the credentials that are used here what the launcher's policy in docs/aws lists.",
    "AccessDeniedException": "Give the credentials that are used here what the launcher's policy in docs/aws lists.",
    "ExpiredToken": "Renew the credentials (for example `aws sso login`), and run the same command again.",
    "ExpiredTokenException": "Renew the credentials (for example `aws sso login`), and run the same command again.",
    "InvalidClientTokenId": "Correct the credentials: `aws sts get-caller-identity` shows whether they are known.",
    "UnrecognizedClientException": "Correct the credentials: `aws sts get-caller-identity` shows whether they are known.",
    "NoSuchBucket": "Correct SAGEMAKER_BUCKET, or make the bucket.",
    "ValidationException": "Correct what it names in the block compute.sagemaker, or in .env.",
    "ThrottlingException": "Wait a minute, and run the same command again.",
}


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Say an error of AWS's as a sentence: what could not be done, its reason, what helps.

    Raises:
        RequestError: there are no credentials.
        WorkError: anything else that AWS or the way to it refuses.
    """
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise RequestError(
            f"{what}: AWS credentials are missing. `aws configure` or `aws sso login` sets them."
        ) from error
    except ClientError as error:
        found = error.response["Error"]
        remedy = _CODES.get(found["Code"], "`make preflight` checks what a job needs.")
        raise WorkError(f"{what}: {found['Code']}: {found['Message'].rstrip('.')}. {remedy}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise WorkError(
            f"{what}: {str(error).rstrip('.')}. Look at the network, and run the same command again."
        ) from error


def is_capacity(description: dict[str, Any]) -> bool:
    """Whether a job ended because there was no machine of its type; another type may then be there."""
    if description["TrainingJobStatus"] == "Stopped":
        # The wait ended before the job ever began.
        return description["SecondaryStatus"] == "MaxWaitTimeExceeded" and "TrainingStartTime" not in description
    return bool(_CAPACITY[0].search(description.get("FailureReason", "")))


def explain(description: dict[str, Any], last_lines: Sequence[str] = ()) -> WorkError:
    """Why a job did not complete, with a remedy, SageMaker's own words and the end of the log.

    Args:
        description: of DescribeTrainingJob, the status being `Failed` or `Stopped`.
    """
    name, reason = description["TrainingJobName"], description.get("FailureReason", "").strip()
    sentence, remedy = _cause(description, reason)
    text = f"Job {name} {'failed' if description['TrainingJobStatus'] == 'Failed' else 'ended'}. {sentence} {remedy}"
    if reason and sentence not in reason:
        text += f"\nSageMaker says: {reason}"
    if last_lines:
        text += f"\nThe last {len(last_lines)} lines of its log:\n" + "\n".join(f"  {line}" for line in last_lines)
    return WorkError(text)


def _cause(description: dict[str, Any], reason: str) -> tuple[str, str]:
    spot = bool(description.get("EnableManagedSpotTraining"))
    stopping = description["StoppingCondition"]
    goes_on = "The same command goes on from its newest checkpoint."
    if description["SecondaryStatus"] == "MaxRuntimeExceeded":
        return f"It was ended after max_run_s, {stopping['MaxRuntimeInSeconds']} s.", (
            f"{goes_on} Raise compute.sagemaker.max_run_s if it should end in one job."
        )
    if description["SecondaryStatus"] == "MaxWaitTimeExceeded":
        return f"Waiting for spot machines and running took more than {stopping['MaxWaitTimeInSeconds']} s.", (
            f"{goes_on} Raise compute.sagemaker.max_wait_s, name fallback_instance_types, or set use_spot to false."
        )
    if description["TrainingJobStatus"] == "Stopped":
        return "It was stopped, and not from here.", goes_on
    facts = {
        "type": description["ResourceConfig"]["InstanceType"],
        "volume": description["ResourceConfig"]["VolumeSizeInGB"],
        "image": description["AlgorithmSpecification"].get("TrainingImage", ""),
        "role": description["RoleArn"],
        "bucket": description["OutputDataConfig"]["S3OutputPath"],
        "spot": " on the spot market" if spot else "",
        "on_demand": ", or set compute.sagemaker.use_spot to false" if spot else "",
    }
    has_run = reason.startswith("AlgorithmError")
    # SageMaker's own words may be of a full disk or of memory too.
    for pattern, sentence, remedy in _RUN if has_run else (*_RUN, *_NOT_RUN):
        if pattern.search(reason):
            return sentence.format(**facts), remedy.format(**facts)
    own = re.search(r"Error: (.*?)(, exit code: \d+)?$", reason.removeprefix("AlgorithmError: "), re.DOTALL)
    if has_run and own:
        # The project's own errors say what to do.
        return own[1].strip(), "Once that is mended, the same command goes on from the newest checkpoint."
    return "The training process ended with an error.", f"Its log says where. {goes_on}"
