"""Explains failed jobs and errors of AWS, each as a sentence with a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    LoginError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as LostConnectionError,
)

from llm_engineering.errors import RequestError, WorkError

# A pattern to search for in FailureReason, what a match means, and the remedy. _NOT_RUN is for SageMaker's messages about
# jobs that could not start; _RUN is for the errors of jobs that ran.
_Meaning = tuple[re.Pattern[str], str, str]
_CAPACITY: _Meaning = (
    re.compile(r"CapacityError|insufficient capacity|Unable to provision", re.IGNORECASE),
    "AWS has no available machine of the type {type}{spot}.",
    "Name other types in compute.sagemaker.fallback_instance_types, try again later, or use another region{on_demand}.",
)
_NOT_RUN: tuple[_Meaning, ...] = (
    _CAPACITY,
    (
        # The word "image" alone may be a part of an address in S3.
        re.compile(r"pull.*image|image.*pull|\.dkr\.ecr\.|ecr:", re.IGNORECASE),
        "The image {image} could not be pulled.",
        "`make image` builds and pushes it. It must be in the job's region, and the job's role needs ecr:BatchGetImage "
        "and ecr:GetDownloadUrlForLayer. A VPC without internet also needs endpoints of ECR and S3.",
    ),
    (
        re.compile(r"AccessDenied|not authorized|Forbidden|403", re.IGNORECASE),
        "The job's role lacks a permission.",
        "Compare {role} with docs/aws/job.json: it must read and write {bucket}.",
    ),
)
_RUN: tuple[_Meaning, ...] = (
    (
        re.compile(r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC"),
        "The GPU ran out of memory.",
        "Lower per_device_train_batch_size or formatting.max_length, set gradient_checkpointing, or choose an instance "
        "type with a larger GPU than {type}.",
    ),
    (
        re.compile(r"exit code: 137|SIGKILL|instance type with more memory"),
        "The machine ran out of memory: the training process was killed.",
        "Choose an instance type with more memory than {type}, or lower compute.num_processes.",
    ),
    (
        re.compile(r"No space left on device"),
        "The job's volume of {volume} GB is full.",
        "Raise compute.sagemaker.volume_size_gb: it holds base model, checkpoints and results.",
    ),
)
_GRANT = "Give these credentials the permissions of docs/aws/launcher.json."
_RENEW = "Renew the credentials (for example `aws sso login`), and run the same command again."
_SET_CLOCK = "The clock of this machine is wrong: set it (`timedatectl set-ntp true`), and run the same command again."
_CORRECT = "Correct the credentials: `aws sts get-caller-identity` shows whether AWS knows them."
# Remedies by AWS's error code.
_REMEDIES = {
    "ResourceLimitExceeded": "Ask for a higher quota (`make preflight` prints the command), or name other types in "
    "compute.sagemaker.fallback_instance_types.",
    "AccessDenied": _GRANT,
    "AccessDeniedException": _GRANT,
    # S3 answers HEAD requests without a code.
    "403": _GRANT,
    "400": _RENEW,
    "RequestTimeTooSkewed": _SET_CLOCK,
    "RequestExpired": _SET_CLOCK,
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "InvalidToken": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "AuthFailure": _CORRECT,
    "InvalidAccessKeyId": _CORRECT,
    "InvalidClientTokenId": _CORRECT,
    "InvalidSignatureException": _CORRECT,
    "SignatureDoesNotMatch": _CORRECT,
    "UnrecognizedClientException": _CORRECT,
    "NoSuchBucket": "Correct SAGEMAKER_BUCKET, or create the bucket.",
    "ValidationException": "Correct the value that it names, in the block compute.sagemaker or in .env.",
}
_CHECK = "`make preflight` checks everything that a job needs."
# With a wrong clock, a signature is refused with the same codes as with a wrong key.
_WRONG_CLOCK = re.compile(r"Signature (expired|not yet current)")
# Codes of the services for "too many requests" and for a request that arrived too slowly.
_BUSY = re.compile(r"Throttl|TooManyRequests|SlowDown|RequestLimitExceeded|RequestTimeout")
# The tools themselves find that a login has ended, before a request is sent.
_LOST_LOGINS = (CredentialRetrievalError, LoginError, SSOError, TokenRetrievalError)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn an error of AWS inside the block into a message with the reason and a remedy.

    Args:
        what: the beginning of the message, which states what failed.

    Raises:
        RequestError: there are no credentials.
        WorkError: AWS refuses the request, or cannot be reached.
    """
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise RequestError(
            f"{what}: AWS credentials are missing. Set them: `aws configure` or `aws sso login`."
        ) from error
    except (ClientError, BotoCoreError, Boto3Error) as error:
        # A refused upload has AWS's answer as its context.
        wrapped = isinstance(error, Boto3Error) and isinstance(error.__context__, ClientError)
        cause: BaseException | None = error.__context__ if wrapped else error
        if isinstance(cause, ClientError):
            answer = cause.response["Error"]
            reason = f"{answer['Code']}: {answer['Message']}"
        else:
            reason = str(cause)
        raise WorkError(f"{what}: {reason.rstrip('. ')}. {_remedy(cause)}") from error


def _remedy(error: BaseException | None) -> str:
    if is_temporary(error):
        busy = isinstance(error, ClientError)
        return f"{'Wait a minute' if busy else 'Check the network'}, and run the same command again."
    if isinstance(error, _LOST_LOGINS):
        return _RENEW
    if not isinstance(error, ClientError):
        return _CHECK
    answer = error.response["Error"]
    return _SET_CLOCK if _WRONG_CLOCK.search(answer["Message"]) else _REMEDIES.get(answer["Code"], _CHECK)


def is_temporary(error: BaseException | None) -> bool:
    """Whether the same request to AWS may succeed later: the network or the service failed, or it is too busy."""
    if not isinstance(error, ClientError):
        return isinstance(error, (LostConnectionError, HTTPClientError, Boto3Error))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or bool(_BUSY.search(error.response["Error"]["Code"]))


def is_capacity(description: dict[str, Any]) -> bool:
    """Whether a job ended because AWS had no available machine of its type. Another type may then help."""
    if description["TrainingJobStatus"] == "Stopped":
        # The wait ended before the job started.
        return description["SecondaryStatus"] == "MaxWaitTimeExceeded" and "TrainingStartTime" not in description
    return bool(_CAPACITY[0].search(description.get("FailureReason", "")))


def explain(description: dict[str, Any], last_lines: Sequence[str] = ()) -> WorkError:
    """The error for a job that did not complete: reason, remedy, SageMaker's message and the end of the log.

    Args:
        description: DescribeTrainingJob's answer, with the status `Failed` or `Stopped`.
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
    resumes = "The same command resumes from the newest checkpoint."
    if description["SecondaryStatus"] == "MaxRuntimeExceeded":
        return f"SageMaker ended it after max_run_s, {stopping['MaxRuntimeInSeconds']} s.", (
            f"{resumes} Raise compute.sagemaker.max_run_s to finish in one job."
        )
    if description["SecondaryStatus"] == "MaxWaitTimeExceeded":
        return f"Waiting for spot machines and running took more than {stopping['MaxWaitTimeInSeconds']} s.", (
            f"{resumes} Raise compute.sagemaker.max_wait_s, name fallback_instance_types, or set fallback_on_demand."
        )
    if description["TrainingJobStatus"] == "Stopped":
        return "It was stopped, but not by this command.", resumes
    facts = {
        "type": description["ResourceConfig"]["InstanceType"],
        "volume": description["ResourceConfig"]["VolumeSizeInGB"],
        "image": description["AlgorithmSpecification"].get("TrainingImage", ""),
        "role": description["RoleArn"],
        "bucket": description["OutputDataConfig"]["S3OutputPath"],
        "spot": " on the spot market" if spot else "",
        "on_demand": ", or set compute.sagemaker.fallback_on_demand" if spot else "",
    }
    has_run = reason.startswith("AlgorithmError")
    # SageMaker itself may also report a full disk or too little memory.
    for pattern, sentence, remedy in _RUN if has_run else (*_RUN, *_NOT_RUN):
        if pattern.search(reason):
            return sentence.format(**facts), remedy.format(**facts)
    own = re.search(r"Error: (.*?)(, exit code: \d+)?$", reason.removeprefix("AlgorithmError: "), re.DOTALL)
    if has_run and own:
        # The project's own errors have a remedy.
        return own[1].strip(), "After that, the same command resumes from the newest checkpoint."
    return "The training process ended with an error.", f"Its log shows where. {resumes}"
