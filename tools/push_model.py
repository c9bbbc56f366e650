"""Publishes a model on the Hugging Face Hub: python -m tools.push_model [--version N] [--repo owner/name]"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

logger = logging.getLogger("llm_engineering.push")


def main() -> int:
    """Parse the command line and publish; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.push_model", description="Publish a merged, verified model.")
    parser.add_argument("--version", metavar="N", help="default: the version in production, else staging")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="instead of the recipe's hub.repo_id")
    parser.add_argument("--public", action="store_true", help="for everyone to see; without it, private")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _push(arguments), arguments.debug)


def _push(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    hub = recipe.hub
    if hub is None:
        raise RequestError(
            "The recipe does not say under which licence the model may be published. Add it, e.g. "
            "--set hub.license=apache-2.0 (`other` if it has no short name)."
        )
    repo_id = arguments.repo or hub.repo_id
    if repo_id is None:
        raise RequestError("No repository is named: add --repo owner/name, or hub.repo_id to the recipe.")
    private = hub.private and not arguments.public

    from llm_engineering.publish.hub import check_repo_id, find_token, publish
    from llm_engineering.publish.model_card import base_licence, render_model_card
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    check_repo_id(repo_id)
    find_token(settings.hf_token)
    prepare_zenml()
    from tools.merged import merged_model
    from tools.model_card import card_facts
    from tools.promoted import find_model

    found = find_model(recipe, arguments.version)
    base = base_licence(found.base.name_or_path, hub)
    if base is None:
        raise RequestError(
            f"The licence of the base model {found.base.name_or_path} is not known here, and the model is made of it: "
            "add it to the recipe, e.g. --set hub.base_license=llama3.1."
        )
    logger.info("Model:       %s", found.described)
    folder = merged_model(found, recipe, settings)
    facts = card_facts(found, folder, recipe)
    logger.info("Licences:    model %s, base model %s", hub.license, base)
    logger.info("Publishing:  %s, %s", repo_id, "private" if private else "PUBLIC: everyone can read it")
    files: dict[str, bytes | Path] = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    files["README.md"] = render_model_card(facts).encode()
    print(publish("model", files, repo_id, private, settings.hf_token, _is_ours))
    return 0


def _is_ours(file: str) -> bool:
    """Whether a file of a repository is one that a model consists of: left over, old weights would be loaded."""
    return "/" not in file and file.endswith((".safetensors", ".json", ".jinja"))


if __name__ == "__main__":
    sys.exit(main())
