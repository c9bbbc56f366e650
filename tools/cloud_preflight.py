"""Looks at everything that a SageMaker job needs: python -m tools.cloud_preflight --config FILE [--json]

Exit code 2 where something would fail, with all of it in one list; silence but for a line where nothing would.
"""

from __future__ import annotations

import argparse
import json
import sys

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.preflight import check, problems
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.settings import Settings
from tools.cli import add_recipe_arguments, exit_code, start_logging


def main() -> int:
    """Check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.cloud_preflight", description="Check what a SageMaker job of a recipe needs."
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _preflight(arguments), arguments.debug)


def _preflight(arguments: argparse.Namespace) -> int:
    recipe, settings = load_recipe(arguments.config, arguments.set), Settings()
    if recipe.compute.sagemaker is None:
        raise RequestError(
            f"{arguments.config} trains here, not on SageMaker: there is nothing to check. Name another one: "
            "make preflight CONFIG=configs/sagemaker_8b.yaml"
        )
    account = Account.resolve(recipe.compute.sagemaker, settings)
    if arguments.json:
        found = problems(recipe, account, settings)
        print(json.dumps([problem._asdict() for problem in found]))
        return RequestError.exit_code if any(not problem.is_warning for problem in found) else 0
    check(recipe, account, settings)
    print(f"Nothing stands in the way of a job in {account.region}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
