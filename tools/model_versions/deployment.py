"""The commands `models deploy` and `models undeploy`, for an endpoint of Amazon SageMaker."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, Version, prepare_zenml

logger = logging.getLogger("llm_engineering.deployment")

Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Name of the endpoint. Default: the recipe's name.")
]


def deploy(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    version: Version = None,
    name: Name = None,
    instance_type: Annotated[
        str | None,
        typer.Option(
            "--instance-type", metavar="TYPE", help="Type of the machines. Default: compute.sagemaker.instance_type."
        ),
    ] = None,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Number of machines.")] = 1,
    update: Annotated[
        bool, typer.Option("--update", help="Replace what an existing endpoint of this name serves.")
    ] = False,
) -> int:
    """Serve a model at a SageMaker endpoint.

    The version is merged, verified, and registered in SageMaker's model registry with its measures. The endpoint is paid
    until `models undeploy` removes it. The same command continues after an interruption.

    Example: `llm-engineering models deploy --config configs/sagemaker_8b.yaml --version 3 --instance-type ml.g5.2xlarge`
    """
    recipe = load_recipe(config, overrides or ())
    machines = _machines(recipe, instance_type)
    from llm_engineering.cloud.sagemaker import endpoints
    from llm_engineering.cloud.sagemaker.account import Account
    from llm_engineering.cloud.sagemaker.failures import translated
    from llm_engineering.cloud.sagemaker.preflight import check_endpoint
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    endpoint = name or endpoints.default_name(recipe.name)
    endpoints.check_name(endpoint)
    machines = machines.model_copy(update={"instance_count": instances})
    account = Account.resolve(machines, settings)
    prepare_zenml()
    from tools.model_versions.handover import card_facts
    from tools.model_versions.signatures import signed_model
    from tools.model_versions.versions import find_model

    found = find_model(recipe, version)
    logger.info("%s", found.described)
    check_endpoint(recipe, machines, account, settings)
    folder, signature = signed_model(found, recipe, settings)
    facts = card_facts(found, folder, recipe)
    measures = {
        measure: f"{estimate['value']:.4g}" + (f" from {low:.4g} to {high:.4g}" if low is not None else "")
        for measure, values in facts.report["measures"].items()
        if (estimate := values["models"].get(found.name)) is not None
        for low, high in [(estimate["low"], estimate["high"])]
    }
    files = {file.name: file for file in folder.iterdir() if file.is_file()} | signature
    lineage = {key: facts.lineage[key] for key in ("run", "recipe", "code")}
    # lm_eval may have more measures than the registry takes.
    names = sorted(measures, key=lambda measure: measure.startswith("lm_eval"))[: 50 - len(lineage)]
    known = lineage | {measure: measures[measure] for measure in names}
    served = endpoints.Served(recipe.name, found.version.number, files, known, recipe.model.trust_remote_code)
    logger.info("%s", endpoints.hourly(machines, account))
    with translated(f"The endpoint {endpoint} cannot be deployed"):
        endpoints.deploy(served, endpoint, machines, account, update)
    print(endpoint)
    return 0


def undeploy(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    name: Name = None,
    packages: Annotated[
        bool, typer.Option("--packages", help="Remove the packages of its models from the model registry, too.")
    ] = False,
) -> int:
    """Remove a SageMaker endpoint, its configurations and its models.

    What exists is removed, so the command can be repeated after an interruption. The files in S3 stay.

    Example: `llm-engineering models undeploy --name handbook`
    """
    recipe = load_recipe(config, overrides or ())
    from llm_engineering.cloud.sagemaker import endpoints
    from llm_engineering.cloud.sagemaker.account import Account
    from llm_engineering.cloud.sagemaker.failures import translated
    from llm_engineering.recipe.settings import Settings

    endpoint = name or endpoints.default_name(recipe.name)
    endpoints.check_name(endpoint)
    # No machine is started.
    account = Account.resolve(_machines(recipe, "ml.m5.large"), Settings())
    is_empty = True
    with translated(f"The endpoint {endpoint} cannot be removed"):
        for part in endpoints.undeploy(endpoint, account, packages):
            is_empty = False
            print(f"Removed: {part}")
    if is_empty:
        print(f"There is nothing to remove of an endpoint {endpoint}.")
    return 0


def _machines(recipe: Recipe, instance_type: str | None) -> SageMakerConfig:
    """The recipe's block `compute.sagemaker`, with this instance type."""
    config = recipe.compute.sagemaker
    if config is not None:
        return config.model_copy(update={"instance_type": instance_type or config.instance_type})
    if instance_type is None:
        raise RequestError(
            "The recipe names no machine for the endpoint. Add one, for example ARGS='--instance-type ml.g5.xlarge'."
        )
    return SageMakerConfig(instance_type=instance_type)
