"""Renders rows with the model's chat template, and labels the tokens that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, Message, Row, TextRow
from llm_engineering.errors import RequestError, WorkError

IGNORE_INDEX = -100


class Tokens(NamedTuple):
    """Token ids of a conversation, and labels of the same length: the id of a trained token, else -100."""

    input_ids: list[int]
    labels: list[int]


class Pair(NamedTuple):
    """Token ids of a preference row: the prompt, and the two answers with their end-of-turn tokens."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Segment(NamedTuple):
    """A piece of a rendered conversation: an answer with its end of turn (trained), or the text between answers."""

    text: str
    trained: bool


class CrossingTokensError(ValueError):
    """A token contains the end of the prompt and the start of the answer, so the two cannot get different labels."""


def render(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Tokens | Pair | CrossingTokensError]:
    """Token ids of rows, tokenised as one batch.

    A prompt and its answer are tokenised separately, because at inference the model gets the tokens of the prompt and
    generates those of the answer.

    Raises:
        WorkError: the template renders a prompt differently once it is answered, or it does not end an answer with the
            end-of-turn token.
    """
    if not rows:
        return []
    conversations = [_segments(row, answer, tokenizer) for row in rows for answer in row.answers]
    tokenised = iter(_tokenise(conversations, tokenizer))
    rendered: list[Tokens | Pair | CrossingTokensError] = []
    for row in rows:
        if isinstance(row, InstructionRow):
            rendered.append(next(tokenised))
            continue
        chosen, rejected = next(tokenised), next(tokenised)
        if isinstance(chosen, Tokens) and isinstance(rejected, Tokens):
            start = prompt_length(chosen)
            rendered.append(
                Pair(chosen.input_ids[:start], chosen.input_ids[start:], rejected.input_ids[prompt_length(rejected) :])
            )
        else:
            rendered.append(chosen if isinstance(chosen, CrossingTokensError) else rejected)
    return rendered


def text_tokens(rows: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Token ids of texts, each with the tokenizer's own start token if it has one, and with its end token.

    Every token is trained, so that the model learns the text and where it ends. No chat template is applied.
    """
    encoded = tokenizer([row.text for row in rows], return_attention_mask=False)["input_ids"]
    end = tokenizer.eos_token_id
    # Some tokenizers, e.g. T5's, add the end token themselves.
    ids = [tokens if tokens[-1:] == [end] else [*tokens, end] for tokens in encoded]
    return [Tokens(tokens, list(tokens)) for tokens in ids]


def prompt_length(tokens: Tokens) -> int:
    """Tokens before the first trained one."""
    return next(i for i, label in enumerate(tokens.labels) if label != IGNORE_INDEX)


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt that ends with `messages`. Training, evaluation and serving use the same."""
    return _encode([_apply(tokenizer, messages, add_generation_prompt=True)], tokenizer)[0]


def _segments(row: Row, completion: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Render a conversation, and cut it where answers begin and end.

    For each answer, the template is applied to the conversation without it and with it; the difference is the answer.
    The text after the last end of turn (often a line break) is left out, because generation stops before it.
    """
    messages = list(row.prompt)
    segments: list[Segment] = []
    done = ""
    for message in completion:
        if message.role == "assistant":
            asked = _apply(tokenizer, messages, add_generation_prompt=True)
            answered = _apply(tokenizer, [*messages, message], add_generation_prompt=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise WorkError(
                    f"{_where(row)}: the chat template of {tokenizer.name_or_path} renders a prompt differently once it "
                    "is answered, so the model would be trained on other prompts than it gets at inference. "
                    "Use a template that only appends."
                )
            end = answered.rfind(str(tokenizer.eos_token), len(asked))
            if end <= len(asked) or answered[end:].removeprefix(str(tokenizer.eos_token)).strip():
                raise _no_end_of_turn(tokenizer, _where(row))
            end += len(str(tokenizer.eos_token))
            segments += [Segment(asked[len(done) :], False), Segment(answered[len(asked) : end], True)]
            done = answered[:end]
        messages.append(message)
    if not segments:
        raise WorkError(f"{_where(row)}: its completion has no assistant turn, so no token of it would be trained.")
    return segments


def _tokenise(
    conversations: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens | CrossingTokensError]:
    if _is_joinable(tokenizer):
        ids = iter(_encode([segment.text for segments in conversations for segment in segments], tokenizer))
        pieces: Iterable[list[list[int]] | CrossingTokensError] = (
            [next(ids) for _ in segments] for segments in conversations
        )
    else:
        pieces = (_tokenise_whole(segments, tokenizer) for segments in conversations)
    tokenised: list[Tokens | CrossingTokensError] = []
    for segments, parts in zip(conversations, pieces, strict=True):
        if isinstance(parts, CrossingTokensError):
            tokenised.append(parts)
            continue
        tokens = Tokens([], [])
        for segment, part in zip(segments, parts, strict=True):
            if segment.trained and part[-1:] != [tokenizer.eos_token_id]:
                raise _no_end_of_turn(tokenizer, "every row")
            tokens.input_ids.extend(part)
            tokens.labels.extend(part if segment.trained else [IGNORE_INDEX] * len(part))
        tokenised.append(tokens)
    return tokenised


def _tokenise_whole(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]] | CrossingTokensError:
    """Token ids of each segment, cut from those of the whole text: for tokenizers that put a space before each text."""
    texts = ["".join(segment.text for segment in segments[:count]) for count in range(1, len(segments) + 1)]
    parts: list[list[int]] = []
    done: list[int] = []
    for whole in _encode(texts, tokenizer):
        if whole[: len(done)] != done:
            return CrossingTokensError("its answer begins with white space that the tokenizer joins to the prompt")
        parts.append(whole[len(done) :])
        done = whole
    return parts


def _is_joinable(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the concatenated tokens of two texts decode to the concatenated texts."""
    first, second = _encode(["a", "b"], tokenizer)
    return str(tokenizer.decode(first + second)) == "ab"


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # A tokenizer cannot read an empty batch.
    if not texts:
        return []
    # The template already writes the special tokens.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return list(encoded["input_ids"])


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise WorkError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so it is undefined how to render a "
            "conversation. Use a chat (instruct) model, or add a template to the tokenizer."
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False))


def _no_end_of_turn(tokenizer: PreTrainedTokenizerBase, where: str) -> WorkError:
    return WorkError(
        f"{where}: with the chat template of {tokenizer.name_or_path} its answer does not end with the end-of-turn token "
        f"{tokenizer.eos_token!r}, so the model would never learn to stop. Check the tokenizer's eos_token and template."
    )


def _where(row: Row) -> str:
    return f"row {row.id} ({row.source})"


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render a short conversation, so that an unusable template is refused before any work.

    Raises:
        RequestError: the template is no Jinja, changes what it wrote before, or does not end answers with the
            end-of-turn token.
    """
    turns = [Message(role=role, content=text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    probe = InstructionRow(
        prompt=turns, completion=[Message(role="assistant", content="d")], source="two turns", origin="check"
    )
    try:
        render([probe], tokenizer)
    except jinja2.TemplateError as error:
        raise RequestError(f"The chat template of {tokenizer.name_or_path} cannot be used: {error}.") from error
    except WorkError as error:
        raise RequestError(str(error)) from error
