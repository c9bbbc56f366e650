"""Registers a ZenML stack that keeps artifacts in S3, and makes it the active one: python -m tools.stack_aws

Runs stay on this machine. No credentials are stored: S3 is reached with those of the environment, as AWS's tools do.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from uuid import UUID

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import Settings
from tools.cli import exit_code, prepare_zenml, start_logging

NAME = "aws"


def main() -> int:
    """Register; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.stack_aws", description="Keep artifacts in S3.")
    parser.add_argument("--bucket", help="the bucket (default: SAGEMAKER_BUCKET)")
    parser.add_argument("--prefix", default="llm-engineering/artifacts", help="folder in it (default: %(default)s)")
    parser.add_argument("--off", action="store_true", help="make the local stack the active one again")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _register(arguments), arguments.debug)


def _register(arguments: argparse.Namespace) -> int:
    from zenml.client import Client
    from zenml.enums import StackComponentType

    prepare_zenml()
    client = Client()
    if arguments.off:
        client.activate_stack("default")
        print("Artifacts are kept on this machine again; those in S3 stay where they are.")
        return 0
    bucket = arguments.bucket or Settings().sagemaker_bucket
    if not bucket:
        raise RequestError("No bucket is known: set SAGEMAKER_BUCKET in .env, or name one with --bucket.")
    if importlib.util.find_spec("s3fs") is None:
        raise RequestError(
            "ZenML reaches S3 with s3fs, which is not installed: pip install -c requirements.lock -e '.[aws]'"
        )
    path = f"s3://{bucket}/{arguments.prefix.strip('/')}"
    kind = StackComponentType.ARTIFACT_STORE
    stores = {store.configuration.get("path"): store for store in client.list_stack_components(type=kind).items}
    # A store's path cannot be changed once it holds artifacts, so each path has a store of its own.
    store = stores.get(path) or client.create_stack_component(
        name=f"{NAME}-{bucket}-{len(stores)}", flavor="s3", component_type=kind, configuration={"path": path}
    )
    components: dict[StackComponentType, str | UUID] = {kind: store.id, StackComponentType.ORCHESTRATOR: "default"}
    if any(stack.name == NAME for stack in client.list_stacks(name=NAME).items):
        client.update_stack(name_id_or_prefix=NAME, component_updates={kind: [store.id]})
    else:
        client.create_stack(name=NAME, components=components)
    client.activate_stack(NAME)
    print(f"Stack {NAME} is active: artifacts of new runs are kept in {path}. `make stack-aws ARGS=--off` goes back.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
