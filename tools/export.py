"""Hands a model over: python -m tools.export [--version N] [--format safetensors|gguf] [--output PATH]"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

logger = logging.getLogger("llm_engineering.export")


def main() -> int:
    """Merge, verify, register and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description="Merge, verify and register a model, and write its files."
    )
    parser.add_argument("--version", metavar="N", help="default: the version in production, else staging")
    parser.add_argument("--format", choices=("safetensors", "gguf"), default="safetensors")
    parser.add_argument("--output", type=Path, metavar="PATH", help="a new folder, or with --format gguf a new file")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _export(arguments), arguments.debug)


def _export(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    output: Path | None = arguments.output
    is_gguf = arguments.format == "gguf"
    if is_gguf and output is None:
        raise RequestError("GGUF is one file: say where, e.g. OUTPUT=model.gguf.")
    if output is not None:
        _check_output(output, is_gguf)
    from llm_engineering.publish.model_card import render_model_card
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    settings.check_writable()
    prepare_zenml()
    from tools.merged import copy_model, merged_model
    from tools.model_card import card_facts
    from tools.promoted import find_model

    found = find_model(recipe, arguments.version)
    logger.info("%s", found.described)
    folder = merged_model(found, recipe, settings)
    if output is None:
        print(folder)
        return 0
    if is_gguf:
        from llm_engineering.publish.gguf import write_gguf

        write_gguf(folder, output, recipe.name)
    else:
        copy_model(folder, output)
        card = render_model_card(card_facts(found, folder, recipe))
        (output / "README.md").write_text(card, encoding="utf-8")
    print(output)
    return 0


def _check_output(output: Path, is_gguf: bool) -> None:
    """Refuse a place that holds something, before any work."""
    if is_gguf and output.exists():
        raise RequestError(f"OUTPUT {output} exists: name another file, nothing is replaced.")
    if is_gguf and not output.parent.is_dir():
        raise RequestError(f"OUTPUT {output} cannot be written: there is no folder {output.parent}.")
    if not is_gguf and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"OUTPUT {output} exists and is no empty folder: name another one, nothing is replaced.")


if __name__ == "__main__":
    sys.exit(main())
