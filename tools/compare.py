"""Shows what base, SFT and DPO model answer, side by side: python -m tools.compare --prompt "What is a list?" """

from __future__ import annotations

import argparse
import logging
import sys

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

logger = logging.getLogger("llm_engineering.compare")


def main() -> int:
    """Print the answers; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare", description="Ask the base model and what was trained on it the same question."
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--version", metavar="N", help="default: the version in production, else staging")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _compare(arguments), arguments.debug)


def _compare(arguments: argparse.Namespace) -> int:
    if not arguments.prompt.strip():
        raise RequestError('There is no question. Ask one: make compare PROMPT="What is a list?"')
    if arguments.max_new_tokens < 1:
        raise RequestError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}.")
    recipe = load_recipe(arguments.config, arguments.set)

    from rich.console import Console
    from rich.table import Table

    from llm_engineering.data.rows import Message
    from llm_engineering.evaluation.measures import Models
    from llm_engineering.models.device import choose_device
    from llm_engineering.models.loading import load_model
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.publish.conversation import has_room
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.recipe.training_blocks import ModelConfig

    settings = Settings()
    prepare_zenml()
    from tools.promoted import find_model

    found = find_model(recipe, arguments.version)
    logger.info("%s", found.described)
    # Saved with what was trained: every model is asked with the template of training, as evaluation does.
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(found.folders[found.name])), settings)
    base = load_model(found.base, settings, choose_device(recipe.compute.here))
    question = [Message(role="user", content=arguments.prompt)]
    if not has_room(question, base, tokenizer, arguments.max_new_tokens):
        raise RequestError(
            f"The question is longer than the model can read beside an answer of {arguments.max_new_tokens} tokens. "
            "Shorten it, or lower --max-new-tokens."
        )
    models = Models(base, found.folders, tokenizer, 1, recipe.evaluation.repetition_penalty)
    shown = Table(title=arguments.prompt, title_justify="left", title_style="bold")
    answers = []
    for name in models.names:
        logger.info("Asking %s", name)
        sample = models.answer(name, question, arguments.max_new_tokens)
        end = "ended by itself" if sample.stopped else f"cut at {arguments.max_new_tokens} tokens"
        shown.add_column(name if name == "base" else name.upper(), overflow="fold", ratio=1)
        answers.append((sample.text, end))
    shown.add_row(*(text for text, _ in answers), end_section=True)
    shown.add_row(*(f"[{end}]" for _, end in answers))
    # A fixed width off a terminal: logs and pipes are not cut to 80 columns.
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False).print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
