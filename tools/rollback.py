"""Puts the former production version back: python -m tools.rollback [--note "..."]"""

from __future__ import annotations

import argparse
import sys

from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging


def main() -> int:
    """Roll back; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.rollback", description="Put the former version back.")
    parser.add_argument("--note", default="", help="why; kept with the version")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _roll_back(arguments), arguments.debug)


def _roll_back(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    prepare_zenml()
    from pipelines.registry import person, roll_back

    state = roll_back(recipe.name, person(), arguments.note.strip())
    print(f"{recipe.name} version {state.production[-1].number} is in production again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
