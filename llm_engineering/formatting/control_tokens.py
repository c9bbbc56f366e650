"""Finds texts that spell a control token: the tokenizer would read a user's text as a turn of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import Row
from llm_engineering.models.new_tokens import PLAIN

# How control tokens are written: <|user|>, <｜User｜>, [INST], |||EMAIL|||. A mere tag such as <table> or <think> is none.
_BRACKETED = re.compile(r"[<\[|].+[>\]|]", re.DOTALL)
_TAG = re.compile(r"</?(\w+)>")


class ControlTokens:
    """The added tokens of a tokenizer that no text may spell.

    `all_special_tokens` has only the tokens that the tokenizer names, such as its end token. Others are marked as special and
    have no name (SmolLM2's `<filename>`), or are not even marked (DeepSeek-R1's `<｜User｜>`, Gemma's `<start_of_turn>`). But
    tokenizers also add tokens for ordinary text: white space, HTML tags, words of a field. They do not count, but for a tag
    that the chat template writes.

    The recipe's `model.new_tokens` are for the data, so they count only where the chat template writes them.

    In an answer, tags that open and close, such as `<think>` and `</think>`, are a part of what the model has to write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        plain = {token.content for token in added if not token.special and token.content.strip()}
        marked = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        template = str(tokenizer.chat_template or "")
        new = set(tokenizer.init_kwargs.get(PLAIN, ()))
        control = {
            t for t in plain if _BRACKETED.fullmatch(t) and (t in template or not (t in new or _TAG.fullmatch(t)))
        }
        names = {match[1] for token in plain if (match := _TAG.fullmatch(token))}
        pairs = {tag for name in names for tag in (f"<{name}>", f"</{name}>") if {f"<{name}>", f"</{name}>"} <= plain}
        # Llama 3 has hundreds, so one pattern finds all of them in one pass.
        self._in_answers = _any_of(marked | (control - pairs))
        self._elsewhere = _any_of(marked | control)

    def spelt_in(self, row: Row) -> str:
        """The first control token that the row's text spells; empty if it spells none."""
        for message in chain(row.prompt, *row.answers):
            pattern = self._in_answers if message.role == "assistant" else self._elsewhere
            for text in message.texts:
                if match := pattern.search(text):
                    return match.group()
        return ""


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    # Without a token, the pattern matches nothing.
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
