"""Renders rows with the model's chat template, and labels the tokens that are trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, LabelledRow, Message, PreferenceRow, Row, TextRow
from llm_engineering.errors import WorkError
from llm_engineering.models.chat_template import TEMPLATE_DATE

IGNORE_INDEX = -100


class Tokens(NamedTuple):
    """Token ids of a conversation, and labels of the same length: the id of a trained token, else -100.

    Attributes:
        respaced: whether the chat template changed the white space of an answer, e.g. removed it at the start.
    """

    input_ids: list[int]
    labels: list[int]
    respaced: bool = False


class Pair(NamedTuple):
    """Token ids of a preference row: the prompt, and the two answers with their end-of-turn tokens."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    respaced: bool = False


class Segment(NamedTuple):
    """A piece of a rendered conversation: an answer with its end of turn (trained), or the text between answers."""

    text: str
    trained: bool
    respaced: bool = False


class UnrenderableError(ValueError):
    """A row cannot be rendered for training; `reason` is the short name that the quarantine counts."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


# A list has one element for each answer of a conversation, where the template renders earlier answers differently.
Rendered = Tokens | list[Tokens] | Pair | UnrenderableError


def render(
    rows: Sequence[InstructionRow | PreferenceRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> list[Rendered]:
    """Token ids of rows, tokenised as one batch.

    A prompt and its answer are tokenised separately, because at inference the model gets the tokens of the prompt and
    generates those of the answer.

    Args:
        max_length: tokens after which the later turns of a conversation need not be rendered; None renders all. To find
            where its answers begin and end takes time that is quadratic in the turns that are rendered.

    Raises:
        WorkError: there is no chat template, or the end-of-turn text is no token.
    """
    if not rows:
        return []
    conversations: list[list[list[Segment]] | UnrenderableError] = []
    for row in rows:
        try:
            conversations.append(_conversations(row, _Limit(tokenizer, max_length)))
        except UnrenderableError as error:
            conversations.append(error)
    whole = [part for parts in conversations if not isinstance(parts, UnrenderableError) for part in parts]
    tokenised = iter(_tokenise(whole, tokenizer))
    return [
        parts if isinstance(parts, UnrenderableError) else _rendered(row, [next(tokenised) for _ in parts])
        for row, parts in zip(rows, conversations, strict=True)
    ]


def _rendered(row: Row, parts: Sequence[Tokens | UnrenderableError]) -> Rendered:
    tokens = []
    for part in parts:
        if isinstance(part, UnrenderableError):
            return part
        tokens.append(part)
    if isinstance(row, InstructionRow):
        return tokens[0] if len(tokens) == 1 else tokens
    chosen, rejected = tokens
    start = prompt_length(chosen)
    return Pair(
        chosen.input_ids[:start],
        chosen.input_ids[start:],
        rejected.input_ids[prompt_length(rejected) :],
        chosen.respaced or rejected.respaced,
    )


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


def _conversations(row: InstructionRow | PreferenceRow, limit: _Limit) -> list[list[Segment]]:
    """The segments of each conversation that a row becomes: one, one for each answer, or the two of a pair.

    A completion with a label stays whole, because the label is that of the whole.
    """
    if isinstance(row, PreferenceRow | LabelledRow):
        return [_segments(row.prompt, answer, limit.fresh()) for answer in row.answers]
    try:
        return [_segments(row.prompt, row.completion, limit.fresh())]
    except UnrenderableError as error:
        rows = row.by_answer()
        if error.reason != "template_changes_prompt" or len(rows) == 1:
            raise
    conversations = []
    for one in rows:
        conversations.append(_segments(one.prompt, one.completion, limit))
        if limit.passed:
            break
    return conversations


class _Limit:
    """Tells when a growing text has passed a number of tokens, without counting them each time that it grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.passed = False
        # The turns whose text was found in the rendered text.
        self.checked_turns = 0
        self._next = max_length or 0

    def check(self, text: str) -> None:
        """Count the tokens of the text if it is half as long again as when they were last counted."""
        if self.max_length is not None and len(text) >= self._next:
            self._next = len(text) * 3 // 2
            self.passed = len(_encode([text], self.tokenizer)[0]) > self.max_length

    def fresh(self) -> _Limit:
        """The same limit for another text."""
        return _Limit(self.tokenizer, self.max_length)


def _segments(prompt: Sequence[Message], completion: Sequence[Message], limit: _Limit) -> list[Segment]:
    """Render a conversation, and cut it where answers begin and end.

    For each answer, the template is applied to the conversation without it and with it; the difference is the answer.
    The text after the last end of turn (often a line break) is left out, because generation stops before it.

    Raises:
        UnrenderableError: the template refuses the conversation, leaves out a part of it, does not end an answer, or
            renders turns differently once others follow.
    """
    tokenizer = limit.tokenizer
    messages = list(prompt)
    segments: list[Segment] = []
    done = asked = ""
    for message in completion:
        if message.is_trained:
            asked = checked_text(tokenizer, messages, add_generation_prompt=True)
            answered = checked_text(tokenizer, [*messages, message], add_generation_prompt=False)
            answer = _answer(asked, answered, message, str(tokenizer.eos_token))
            if not asked.startswith(done):
                raise _changed_prompt()
            segments += [Segment(asked[len(done) :], False), answer]
            done = asked + answer.text
            limit.check(done)
            if limit.passed:
                break
        messages.append(message)
    if not segments:
        raise UnrenderableError("no_answer", "it has no assistant turn, so no token of it would be trained")
    # The turns of earlier prompts of the same row have been found in those.
    for message in messages[limit.checked_turns :]:
        if message.role != "assistant" and not contains_text(asked, message.content):
            raise UnrenderableError("template_drops_text", f"the chat template leaves out its {message.role} text")
    limit.checked_turns = len(messages)
    return segments


# The start of an answer that the generation prompt of a reasoning model already writes.
_OPENED = re.compile(r"<think>\s*\Z")
_THOUGHT = re.compile(r"\s*<think>\s*")


def _answer(asked: str, answered: str, message: Message, end: str) -> Segment:
    """The answer with its end of turn, as the model has to write it after the prompt `asked`."""
    opened = _OPENED.search(asked)
    if answered.startswith(asked):
        text = answered[len(asked) :]
    elif opened and answered.startswith(asked[: opened.start()]):
        # DeepSeek-R1's prompt opens the reasoning, and its template leaves the reasoning out of every answer.
        text = answered[opened.start() :]
        if "</think>" in text:
            text = _THOUGHT.sub("", text, count=1)
        else:
            inside = message.content.partition("</think>")[0] if "</think>" in message.content else ""
            thought = message.reasoning_content or inside.replace("<think>", "", 1)
            text = f"{thought.strip()}\n</think>\n\n" + text.lstrip("\n")
    else:
        raise _changed_prompt()
    place = text.rfind(end)
    if place <= 0 or text[place:].removeprefix(end).strip():
        raise UnrenderableError(
            "no_end_of_turn",
            f"the chat template does not end its answer with the end-of-turn token {end!r}, so the model would never learn "
            "to stop",
        )
    text = text[: place + len(end)]
    written = opened.group() + text if opened else text
    for name, part in zip(("answer", "reasoning"), message.texts, strict=False):
        if not contains_text(written, part):
            raise UnrenderableError("template_drops_text", f"the chat template leaves out a part of its {name}")
    return Segment(text, True, respaced=message.content not in written)


def contains_text(text: str, part: str) -> bool:
    """Whether a text contains another one, however the two are spaced."""
    return part in text or "".join(part.split()) in "".join(text.split())


def _changed_prompt() -> UnrenderableError:
    return UnrenderableError(
        "template_changes_prompt",
        "the chat template renders its prompt differently once it is answered, so the model would be trained on other prompts "
        "than it gets at inference; a template that only appends renders it",
    )


def checked_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The text of messages. A template can fail like any program, e.g. where it joins text and nothing."""
    try:
        return _apply(tokenizer, messages, add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise UnrenderableError("template_error", f"the chat template says: {error}") from error


def _tokenise(
    conversations: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens | UnrenderableError]:
    if _is_joinable(tokenizer):
        ids = iter(_encode([segment.text for segments in conversations for segment in segments], tokenizer))
        pieces: Iterable[list[list[int]] | UnrenderableError] = (
            [next(ids) for _ in segments] for segments in conversations
        )
    else:
        pieces = (_tokenise_whole(segments, tokenizer) for segments in conversations)
    tokenised: list[Tokens | UnrenderableError] = []
    for segments, parts in zip(conversations, pieces, strict=True):
        if isinstance(parts, UnrenderableError):
            tokenised.append(parts)
            continue
        tokens = Tokens([], [], any(segment.respaced for segment in segments))
        for segment, part in zip(segments, parts, strict=True):
            if segment.trained and part[-1:] != [tokenizer.eos_token_id]:
                raise WorkError(
                    f"The end-of-turn text {tokenizer.eos_token!r} of {tokenizer.name_or_path} is no token of its own, so the "
                    "model would never learn to stop. Check the tokenizer's eos_token and template."
                )
            tokens.input_ids.extend(part)
            tokens.labels.extend(part if segment.trained else [IGNORE_INDEX] * len(part))
        tokenised.append(tokens)
    return tokenised


def _tokenise_whole(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]] | UnrenderableError:
    """Token ids of each segment, cut from those of the whole text: for tokenizers that put a space before each text."""
    texts = ["".join(segment.text for segment in segments[:count]) for count in range(1, len(segments) + 1)]
    parts: list[list[int]] = []
    done: list[int] = []
    for whole in _encode(texts, tokenizer):
        if whole[: len(done)] != done:
            return UnrenderableError(
                "crossing_tokens", "its answer begins with white space that the tokenizer joins to the prompt"
            )
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
    return list(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise WorkError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so it is undefined how to render a "
            "conversation. Use a chat (instruct) model, or add a template to the tokenizer."
        )
    turns = [
        {
            "role": message.role,
            "content": message.content,
            # Qwen's and others' templates read the first key, those of gpt-oss the second one.
            **({} if message.reasoning_content is None else dict.fromkeys(_REASONING, message.reasoning_content)),
        }
        for message in messages
    ]
    # `load_tokenizer` has written the date into the template; a tokenizer that was loaded otherwise gets the same date here.
    return str(
        tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False, strftime_now=TEMPLATE_DATE.strftime
        )
    )


_REASONING = ("reasoning_content", "thinking")
