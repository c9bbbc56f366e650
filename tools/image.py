"""Builds and pushes the images that jobs run in: python -m tools.image [training|retrain …]"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shutil
import subprocess
import sys
from typing import Any

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.settings import Settings
from tools.cli import PROJECT_ROOT, exit_code, start_logging

TARGETS = {"training": "SAGEMAKER_IMAGE", "retrain": "SAGEMAKER_RETRAIN_IMAGE"}


def main() -> int:
    """Build and push; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.image", description="Build the images and push them to ECR.")
    parser.add_argument("target", nargs="*", metavar="training|retrain", help="which (default: both)")
    parser.add_argument("--repository", default="llm-engineering", help="in ECR (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    for target in arguments.target:
        if target not in TARGETS:
            parser.error(f"{target} is no target: {' or '.join(TARGETS)}")
    start_logging(arguments.debug)
    return exit_code(lambda: _build(arguments.target or list(TARGETS), arguments.repository), arguments.debug)


def _build(targets: list[str], repository: str) -> int:
    if shutil.which("docker") is None:
        raise RequestError(
            "Images are built by docker, which is not installed here: https://docs.docker.com/engine/install"
        )
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = Settings().aws_region or boto3.Session().region_name
    if not region:
        raise RequestError("No region is known: set AWS_REGION in .env, or `region` in ~/.aws/config.")
    ecr = boto3.Session(region_name=region).client("ecr")
    try:
        address = _repository(ecr, repository)
        login = ecr.get_authorization_token()["authorizationData"][0]
    except (BotoCoreError, ClientError) as error:
        raise WorkError(
            f"ECR in {region} cannot be used: {error}. docs/aws/launcher.json lists what is needed."
        ) from error
    user, _, password = base64.b64decode(login["authorizationToken"]).decode().partition(":")
    registry = address.partition("/")[0]
    _docker("login", "--username", user, "--password-stdin", registry, given=password)
    for target in targets:
        image = f"{address}:{tag(target)}"
        folder = PROJECT_ROOT / "docker"
        # SageMaker's machines are x86-64, whatever this one is.
        _docker("build", "--platform", "linux/amd64", "--target", target, "--tag", image, str(folder))
        _docker("push", image)
        print(f"{TARGETS[target]}={image}")
    print("Put these lines into .env.", file=sys.stderr)
    return 0


def tag(target: str) -> str:
    """Names an image by what is in it: its target, and the hash of its lock."""
    lock = PROJECT_ROOT / "docker" / f"{target}.lock"
    return f"{target}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"


def _repository(ecr: Any, name: str) -> str:
    """The repository's address; it is made the first time."""
    try:
        found = ecr.describe_repositories(repositoryNames=[name])["repositories"]
    except ecr.exceptions.RepositoryNotFoundException:
        found = [ecr.create_repository(repositoryName=name)["repository"]]
    address: str = found[0]["repositoryUri"]
    return address


def _docker(*arguments: str, given: str | None = None) -> None:
    """Run docker, its output shown as it comes.

    Raises:
        WorkError: it failed.
    """
    # An attestation would make it an index of manifests, which SageMaker does not take.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    done = subprocess.run(
        ["docker", *arguments],  # noqa: S607
        input=given,
        text=True,
        check=False,
        stdout=sys.stderr,
        env=environment,
    )
    if done.returncode:
        raise WorkError(
            f"`docker {arguments[0]}` failed (exit code {done.returncode}); what it said stands above. "
            "If it cannot connect to its daemon, start that."
        )


if __name__ == "__main__":
    sys.exit(main())
