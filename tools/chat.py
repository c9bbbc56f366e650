"""Talks to the promoted model: python -m tools.chat [--prompt "What is a list?"]"""

from __future__ import annotations

import argparse
import logging
import sys

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

logger = logging.getLogger("llm_engineering.chat")


def main() -> int:
    """Print the answer while it is written; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.chat", description="Talk to the promoted model.")
    parser.add_argument("--prompt", help="without it, on a terminal, a conversation")
    parser.add_argument("--version", metavar="N", help="default: the version in production, else staging")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _chat(arguments), arguments.debug)


def _chat(arguments: argparse.Namespace) -> int:
    prompt: str | None = arguments.prompt
    if prompt is None and not sys.stdin.isatty():
        raise RequestError('There is no question and no terminal. Ask one: make chat PROMPT="What is a list?"')
    if prompt is not None and not prompt.strip():
        raise RequestError('There is no question. Ask one: make chat PROMPT="What is a list?"')
    if arguments.max_new_tokens < 1:
        raise RequestError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}.")
    recipe = load_recipe(arguments.config, arguments.set)

    from llm_engineering.data.rows import Message
    from llm_engineering.publish.conversation import Conversation
    from llm_engineering.publish.merge import merged_device
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    prepare_zenml()
    from tools.merged import merged_model
    from tools.promoted import find_model

    found = find_model(recipe, arguments.version)
    logger.info("%s", found.described)
    folder = merged_model(found, recipe, settings)
    conversation = Conversation(
        folder, merged_device(recipe.compute.here), settings, arguments.max_new_tokens, recipe.model.trust_remote_code
    )
    too_long = f"The question is longer than the model can read beside an answer of {arguments.max_new_tokens} tokens"
    if prompt is not None:
        question = Message(role="user", content=prompt)
        if not conversation.has_room([question]):
            raise RequestError(f"{too_long}. Shorten it, or lower --max-new-tokens.")
        _say_end(conversation.answer([question]).stopped, arguments.max_new_tokens)
        return 0
    logger.info("Ask; an empty line, Ctrl-D or Ctrl-C ends it.")
    messages: list[Message] = []
    try:
        while asked := _ask():
            question = Message(role="user", content=asked)
            if not conversation.has_room([question]):
                logger.info("[%s: ask a shorter one]", too_long)
                continue
            if not conversation.has_room([*messages, question]):
                logger.info("[the conversation is longer than the model can read: it begins anew]")
                messages = []
            messages.append(question)
            answer = conversation.answer(messages)
            _say_end(answer.stopped, arguments.max_new_tokens)
            messages.append(Message(role="assistant", content=answer.text))
    except KeyboardInterrupt:
        print()
    return 0


def _ask() -> str:
    """A line from the terminal; empty at its end."""
    print("> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        # The cursor still stands behind the prompt.
        print()
    return line.strip()


def _say_end(stopped: bool, max_new_tokens: int) -> None:
    if not stopped:
        logger.info("[not ended: the answer was cut at %d tokens, --max-new-tokens]", max_new_tokens)


if __name__ == "__main__":
    sys.exit(main())
