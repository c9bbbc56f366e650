"""Moves a model version to production: python -m tools.promote VERSION [--note "..."] [--force]"""

from __future__ import annotations

import argparse
import sys

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging


def main() -> int:
    """Promote; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.promote", description="Move a model version to production.")
    parser.add_argument("version", help="its number, as `make models` shows it")
    parser.add_argument("--note", default="", help="why; kept with the version")
    parser.add_argument("--force", action="store_true", help="also a version that did not pass its gate; needs --note")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _promote(arguments), arguments.debug)


def _promote(arguments: argparse.Namespace) -> int:
    note = arguments.note.strip()
    if arguments.force and not note:
        raise RequestError(
            "--force needs a NOTE that says why: make promote VERSION=… ARGS=--force NOTE='who asked for it, and why'"
        )
    recipe = load_recipe(arguments.config, arguments.set)
    prepare_zenml()
    from pipelines.registry import StaleError, adapter_of, move, person, stages
    from tools.versions import find_version

    version = find_version(recipe.name, arguments.version)
    production = stages(recipe.name).production
    now = production[-1].number if production else None
    if now == version.number:
        raise RequestError(f"{recipe.name} version {now} is in production already.")
    if adapter_of(version) is None:
        raise RequestError(f"{recipe.name} version {version.number} has no model: its run ended before. See make runs.")
    against = now
    if not arguments.force:
        artifact = version.get_artifact("promotion_decision")
        decision = artifact.load() if artifact is not None else None
        if decision is None or not decision.passed:
            why = "Its run ended before the gate." if decision is None else decision.reason
            raise RequestError(
                f"{recipe.name} version {version.number} has not passed its gate. {why} To promote it all the same: "
                "ARGS=--force NOTE='why'."
            )
        against = decision.incumbent
    try:
        move(version, "production", against, person(), note)
    except StaleError as error:
        if arguments.force:
            raise RequestError(
                f"Production of {recipe.name} has changed since the command began: version {version.number} is not "
                "promoted. See `make models`, and repeat the command if it still holds."
            ) from error
        raise RequestError(
            f"{recipe.name} version {version.number} passed its gate, but {error}. Run it again to be judged against that "
            "(training comes from the cache), or promote it all the same: ARGS=--force NOTE='why'."
        ) from error
    former = f"version {now} was there before, `make rollback` puts it back" if now is not None else "the first one"
    print(f"{recipe.name} version {version.number} is in production: {former}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
