"""Asks the promoted model: python -m tools.chat --prompt "What is a list?" """

from __future__ import annotations

import argparse
import logging
import sys

from llm_engineering.errors import RequestError
from llm_engineering.recipes import load_recipe
from tools.cli import exit_code, prepare_zenml, start_logging

logger = logging.getLogger("llm_engineering.chat")


def main() -> int:
    """Print the answer; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.chat", description="Ask the promoted model.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--config", default="configs/local.yaml", help="the recipe (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _chat(arguments), arguments.debug)


def _chat(arguments: argparse.Namespace) -> int:
    if not arguments.prompt.strip():
        raise RequestError('There is no question. Ask one: make chat PROMPT="What is a list?"')
    if arguments.max_new_tokens < 1:
        raise RequestError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}.")
    recipe = load_recipe(arguments.config, arguments.set)

    from llm_engineering.compute.device import choose_device
    from llm_engineering.config import ModelConfig
    from llm_engineering.data.rows import Message
    from llm_engineering.evaluation.measures import Models
    from llm_engineering.models import load_model, load_tokenizer
    from llm_engineering.settings import Settings
    from tools.promoted import promoted_adapter

    prepare_zenml()
    name, adapter, model, described = promoted_adapter(recipe)
    logger.info("%s", described)
    settings = Settings()
    # Its own tokenizer, saved with it: it is asked with the template that it was trained with.
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(adapter)), settings)
    base = load_model(model, settings, choose_device(recipe.compute))
    models = Models(base, {name: adapter}, tokenizer, batch_size=1)
    sample = models.answer(name, [Message(role="user", content=arguments.prompt)], arguments.max_new_tokens)
    print(sample.text)
    if not sample.stopped:
        logger.info("[not ended: the answer was cut at %d tokens, --max-new-tokens]", arguments.max_new_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
