"""Probes a chat template before any work: which conversations it can render, and how it renders them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.formatting.render import Rendered, UnrenderableError, render


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Render short conversations, so that an unusable template is refused before any work.

    Returns:
        A sentence for each kind of rows that the template cannot render, or renders otherwise than as one conversation.

    Raises:
        RequestError: the template cannot render a question and its answer.
    """
    asked, answer = Message(role="user", content="a"), Message(role="assistant", content="b")
    more = [answer, Message(role="user", content="c"), Message(role="assistant", content="d")]
    single, system, several = (
        _rendered(tokenizer, prompt, completion)
        for prompt, completion in (
            ([asked], [answer]),
            ([Message(role="system", content="e"), asked], [answer]),
            ([asked], more),
        )
    )
    if isinstance(single, UnrenderableError):
        raise RequestError(
            f"The chat template of {tokenizer.name_or_path} cannot be used: {single}. Name another one in "
            "formatting.chat_template, e.g. chatml."
        )
    notes = [
        f"Rows with {what} are set aside as {found.reason}: {found}. formatting.chat_template: chatml renders them."
        for what, found in (("a system message", system), ("several answers", several))
        if isinstance(found, UnrenderableError)
    ]
    if isinstance(several, list):
        notes.append(
            "The chat template renders earlier answers differently, so each answer of a conversation becomes a row of its "
            "own, with the prompt that the model gets when it is served."
        )
    return notes


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: Sequence[Message]) -> Rendered:
    probe = InstructionRow(prompt=list(prompt), completion=list(completion), source="check", origin="check")
    try:
        return render([probe], tokenizer)[0]
    except WorkError as error:
        raise RequestError(str(error)) from error
