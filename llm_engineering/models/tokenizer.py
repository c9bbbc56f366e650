"""Loads the tokenizer and sets its chat template: the model's own, a named one of this project, or a Jinja file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError
from llm_engineering.models.base_model import hub_options, model_path
from llm_engineering.models.chat_template import TEMPLATES, template_text, with_fixed_date, without_template
from llm_engineering.models.new_tokens import add_new_tokens
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

# Tokens with these words in their names never occur in texts.
_UNUSED_TOKENS = ("pad", "reserved", "unused")


def load_tokenizer(model: ModelConfig, settings: Settings, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer, add the new tokens, and set its chat template and its pad token.

    The pad token is an existing token. Only a new token whose name says pad, reserved or unused is taken before it. Any other
    new token would need a larger embedding, in training and in every server of the model. The pad token differs from the end token if the model has another special token. GPT-2 has none, so
    its end token is also its pad token, and code in this project recognises padding by its position, never by its id.

    Args:
        chat_template: the recipe's `formatting.chat_template`; None for the model's own.

    Raises:
        RequestError: there is no such template, neither the recipe nor the model has one, `eos_token` is no token, or a new
            token is one already.
    """
    path, options = model_path(model, settings), hub_options(model, settings)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    add_new_tokens(tokenizer, model)
    # This may change the end token, from which the pad token must differ.
    set_chat_template(tokenizer, chat_template, generation_ends(path, options, tokenizer))
    if model.eos_token is not None:
        if model.eos_token not in tokenizer.get_vocab():
            raise RequestError(
                f"model.eos_token {model.eos_token} is no token of {model.name_or_path}, whose special tokens are "
                f"{', '.join(tokenizer.all_special_tokens)}. Choose one of its tokens, or remove the key."
            )
        tokenizer.eos_token = model.eos_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        found = [t for t in (tokenizer.unk_token, *special) if t and t != tokenizer.eos_token]
        reserved = [t for t in found if any(word in t.lower() for word in _UNUSED_TOKENS)]
        others = [t for t in found if t not in model.added_tokens]
        tokenizer.pad_token = next(iter([*reserved, *others]), tokenizer.eos_token)
    return tokenizer


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: int, new: Sequence[str] = ()) -> None:
    """Check that each token has a row in the model's embedding, which has `rows`.

    Args:
        new: tokens that get a row when the model is loaded.

    Raises:
        RequestError: some tokens have none. A text with one of them, or padding with it, would fail.
    """
    vocabulary = tokenizer.get_vocab().items()
    without = sorted((index, token) for token, index in vocabulary if index >= rows and token not in new)
    if without:
        some = ", ".join(f"{token} ({index})" for index, token in without[:5])
        raise RequestError(
            f"The tokenizer of {tokenizer.name_or_path} has {len(without)} tokens without a row in the model's embedding of {rows} "
            f"rows: {some}. Remove them from tokenizer.json and tokenizer_config.json, or enlarge the embedding with "
            "model.resize_token_embeddings, and save model and tokenizer together."
        )


def generation_ends(path: str | Path, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens at which the model's generation_config.json stops; none if the model has no such file."""
    try:
        ids = GenerationConfig.from_pretrained(path, **options).eos_token_id
    except OSError:
        return []
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids) if token is not None]


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's own end tokens, and the tokenizer's, which ends trained answers."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*ends, tokenizer.eos_token_id})


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, ends: Sequence[str] = ()) -> None:
    """Set the tokenizer's chat template with a fixed date, and the end token that the template writes after an answer.

    Args:
        chat_template: None keeps the template that the tokenizer has.
        ends: the tokens at which the model's own generation stops.

    Raises:
        RequestError: there is no such template, its date cannot be fixed, or `chat_template` is None and the tokenizer has no
            template.
    """
    if chat_template is not None:
        text = template_text(chat_template)
        # Rendered text is tokenised without special tokens, so the template must write the BOS token where the model
        # expects one. The project's templates leave it out; a model's own template and a file's write it themselves.
        has_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        is_ours = text in [template_text(name) for name in TEMPLATES]
        tokenizer.chat_template = "{{ bos_token }}" + text if has_bos and is_ours else text
    elif tokenizer.chat_template is None:
        raise without_template(tokenizer)
    named = tokenizer.chat_template
    # Some models have several templates by name.
    tokenizer.chat_template = (
        {name: with_fixed_date(text) for name, text in named.items()}
        if isinstance(named, dict)
        else with_fixed_date(named)
    )
    _set_end_of_turn(tokenizer, ends)


_ANSWER = "This is an answer."


def _set_end_of_turn(tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]) -> None:
    """Make the token that the chat template writes after an answer the end token.

    Some tokenizers name the token that ends a document, but their template ends an answer with another one: Gemma's name
    `<eos>` and write `<end_of_turn>`, those of Qwen2.5's base models name `<|endoftext|>` and write `<|im_end|>`. GLM's
    templates write nothing after the last answer, and the model stops at the mark of the next turn, `<|user|>`. The template
    then gets this mark as its end, so that the model learns to write it.
    """
    turns = [("user", "A question."), ("assistant", _ANSWER), ("user", "Another question.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        after, before_next = (
            str(tokenizer.apply_chat_template(shown, tokenize=False)).rpartition(_ANSWER)[2]
            for shown in (messages[:2], messages)
        )
    except jinja2.TemplateError:
        # `check_chat_template` refuses this template before a run.
        return
    if str(tokenizer.eos_token) in after:
        return
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if after.strip():
        tokenizer.eos_token = next((t for t in (*ends, *special) if after.startswith(t)), tokenizer.eos_token)
    elif mark := next((t for t in ends if before_next.strip().startswith(t)), None):
        tokenizer.eos_token = mark
        end = f"{{% if messages[-1].role == 'assistant' and not add_generation_prompt %}}{mark}{{% endif %}}"
        named = tokenizer.chat_template
        tokenizer.chat_template = (
            {name: text + end for name, text in named.items()} if isinstance(named, dict) else f"{named}{end}"
        )
