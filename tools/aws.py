"""The commands `cloud preflight`, `cloud image` and `cloud stack`, which prepare an AWS account for SageMaker jobs."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.settings import Settings
from tools.cli import DEFAULT_RECIPE, PROJECT_ROOT, Config, Json, Overrides, prepare_zenml

if TYPE_CHECKING:
    from uuid import UUID

    from zenml.enums import StackComponentType

# Each image with the setting that holds its address. For an argument with several choices, Typer needs an enumeration.
Target = StrEnum("Target", ["training", "retrain"])
TARGETS = {"training": "SAGEMAKER_IMAGE", "retrain": "SAGEMAKER_RETRAIN_IMAGE"}
STACK = "aws"


def preflight(config: Config = DEFAULT_RECIPE, overrides: Overrides = None, as_json: Json = False) -> int:
    """Check what a SageMaker job of a recipe needs.

    Every problem is listed with its remedy. If there is one, the exit code is 2.

    Example: `llm-engineering cloud preflight --config configs/sagemaker_8b.yaml`
    """
    from llm_engineering.cloud.sagemaker.account import Account
    from llm_engineering.cloud.sagemaker.cost import cost_sentences
    from llm_engineering.cloud.sagemaker.preflight import check, problems

    recipe, settings = load_recipe(config, overrides or ()), Settings()
    if recipe.compute.sagemaker is None:
        raise RequestError(
            f"{config} trains on this machine, not on SageMaker, so there is nothing to check. Choose another recipe: "
            "make preflight CONFIG=configs/sagemaker_8b.yaml"
        )
    account = Account.resolve(recipe.compute.sagemaker, settings)
    if as_json:
        found = problems(recipe, account, settings)
        print(json.dumps([problem._asdict() for problem in found]))
        return RequestError.exit_code if any(not problem.is_warning for problem in found) else 0
    check(recipe, account, settings)
    for line in cost_sentences(recipe.compute.sagemaker, account):
        print(line, file=sys.stderr)
    print(f"All checks passed: a job can run in {account.region}.", file=sys.stderr)
    return 0


def image(
    targets: Annotated[
        list[Target] | None,
        typer.Argument(metavar="[training|retrain]...", help="The images to build. Default: both."),
    ] = None,
    repository: Annotated[
        str,
        typer.Option("--repository", metavar="NAME", help="Name of the repository in ECR. The first call creates it."),
    ] = "llm-engineering",
    efa: Annotated[
        bool, typer.Option("--efa", help="Add the software of EFA, AWS's fast network between machines.")
    ] = False,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Add DeepSpeed, for compute.distributed: deepspeed.")
    ] = False,
) -> int:
    """Build the images of SageMaker jobs and push them to ECR.

    Docker has to run on this machine. Copy the printed lines into .env.

    Example: `llm-engineering cloud image training`
    """
    if shutil.which("docker") is None:
        raise RequestError(
            "Images are built with docker, which is not installed. Install it: https://docs.docker.com/engine/install"
        )
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = Settings().aws_region or boto3.Session().region_name
    if not region:
        raise RequestError("No AWS region is set: set AWS_REGION in .env, or `region` in ~/.aws/config.")
    ecr = boto3.Session(region_name=region).client("ecr")
    try:
        address = _repository(ecr, repository)
        login = ecr.get_authorization_token()["authorizationData"][0]
    except (BotoCoreError, ClientError) as error:
        raise WorkError(
            f"ECR in {region} cannot be used: {error}. docs/aws/launcher.json lists the permissions that you need."
        ) from error
    user, _, password = base64.b64decode(login["authorizationToken"]).decode().partition(":")
    registry = address.partition("/")[0]
    _docker("login", "--username", user, "--password-stdin", registry, given=password)
    added = ["--build-arg", "NETWORK=efa"] if efa else []
    added += ["--build-arg", "ADDED=deepspeed.lock"] if deepspeed else []
    for target in targets or TARGETS:
        image = f"{address}:{tag(target)}" + ("-efa" if efa else "") + ("-deepspeed" if deepspeed else "")
        folder = PROJECT_ROOT / "docker"
        # SageMaker's machines are x86-64, even if this machine is not.
        _docker("build", "--platform", "linux/amd64", "--target", target, *added, "--tag", image, str(folder))
        _docker("push", image)
        print(f"{TARGETS[target]}={image}")
    print("Copy these lines into .env.", file=sys.stderr)
    return 0


def stack(
    bucket: Annotated[
        str | None, typer.Option("--bucket", metavar="NAME", help="The bucket in S3. Default: SAGEMAKER_BUCKET.")
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="FOLDER", help="The folder in the bucket.")
    ] = "llm-engineering/artifacts",
    off: Annotated[bool, typer.Option("--off", help="Make the local stack the active one again.")] = False,
) -> int:
    """Register a ZenML stack that stores artifacts in S3.

    The stack becomes the active one. Runs still take place on this machine. No credentials are stored: ZenML uses the
    AWS credentials of the environment.

    Example: `llm-engineering cloud stack --bucket my-bucket`
    """
    from zenml.client import Client
    from zenml.enums import StackComponentType

    prepare_zenml()
    client = Client()
    if off:
        client.activate_stack("default")
        print("New artifacts are stored on this machine again. Artifacts in S3 stay there.")
        return 0
    bucket = bucket or Settings().sagemaker_bucket
    if not bucket:
        raise RequestError("No bucket is set: set SAGEMAKER_BUCKET in .env, or name a bucket with --bucket.")
    if importlib.util.find_spec("s3fs") is None:
        raise RequestError(
            "ZenML reads and writes S3 with s3fs, which is not installed. Install it: pip install -c requirements.lock -e '.[aws]'"
        )
    path = f"s3://{bucket}/{prefix.strip('/')}"
    kind = StackComponentType.ARTIFACT_STORE
    stores = {store.configuration.get("path"): store for store in client.list_stack_components(type=kind).items}
    # The path of a store with artifacts cannot be changed, so each path has its own store.
    store = stores.get(path) or client.create_stack_component(
        name=f"{STACK}-{bucket}-{len(stores)}", flavor="s3", component_type=kind, configuration={"path": path}
    )
    components: dict[StackComponentType, str | UUID] = {kind: store.id, StackComponentType.ORCHESTRATOR: "default"}
    if any(stack.name == STACK for stack in client.list_stacks(name=STACK).items):
        client.update_stack(name_id_or_prefix=STACK, component_updates={kind: [store.id]})
    else:
        client.create_stack(name=STACK, components=components)
    client.activate_stack(STACK)
    print(f"Stack {STACK} is active: new artifacts are stored in {path}. `make stack-aws ARGS=--off` undoes this.")
    return 0


def tag(target: str) -> str:
    """The tag of an image: its target and the hash of the files that decide its content."""
    folder = PROJECT_ROOT / "docker"
    content = b"".join(
        (folder / name).read_bytes() for name in ("Dockerfile", "serve", "deepspeed.lock", f"{target}.lock")
    )
    return f"{target}-{hashlib.sha256(content).hexdigest()[:12]}"


def _repository(ecr: Any, name: str) -> str:
    """Find or create the repository; returns its address."""
    try:
        found = ecr.describe_repositories(repositoryNames=[name])["repositories"]
    except ecr.exceptions.RepositoryNotFoundException:
        found = [ecr.create_repository(repositoryName=name)["repository"]]
    address: str = found[0]["repositoryUri"]
    return address


def _docker(*arguments: str, given: str | None = None) -> None:
    """Run docker, and show its output on stderr.

    Raises:
        WorkError: docker failed.
    """
    # With an attestation, the image would be an index of manifests, which SageMaker refuses.
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
            f"`docker {arguments[0]}` failed with exit code {done.returncode}. Its messages are above. "
            "If it cannot connect to the docker daemon, start the daemon."
        )
