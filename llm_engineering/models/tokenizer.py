"""Loads the tokenizer and gives it the chat template of the recipe: the model's own, a named one, or a Jinja file.

The project's templates only append text, and end every answer with the tokenizer's end token, so that any base model
can be trained with them: no token is added to the model.
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_engineering.errors import RequestError
from llm_engineering.models.loading import hub_revision, model_path
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import ModelConfig

# How tokenizers name tokens that no text has.
_UNUSED_TOKENS = ("pad", "reserved", "unused")


def load_tokenizer(model: ModelConfig, settings: Settings, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that the recipe asks for, and with a pad token.

    The pad token is one that the model has: a new one would need a larger embedding, in training and wherever the
    model is served. It is no end token where there is another, so that padding can be told from the end by its id too.
    GPT-2 has none: there the end token pads, and padding is told by its place alone, as all code here does.

    Args:
        chat_template: as `formatting.chat_template`; None for the model's own.

    Raises:
        RequestError: there is no such template, or the model has none and the recipe names none.
    """
    token = settings.hf_token
    tokenizer = AutoTokenizer.from_pretrained(
        model_path(model, settings),
        revision=hub_revision(model),
        trust_remote_code=model.trust_remote_code,
        token=token.get_secret_value() if token else None,
    )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        others = [t for t in (tokenizer.unk_token, *special) if t and t != tokenizer.eos_token]
        reserved = [t for t in others if any(word in t.lower() for word in _UNUSED_TOKENS)]
        tokenizer.pad_token = next(iter([*reserved, *others]), tokenizer.eos_token)
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those that the model names, and the one that answers are trained to end with."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({*own, tokenizer.eos_token_id})


_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))
CHOICES = f"formatting.chat_template takes {', '.join(TEMPLATES)}, or the path of a Jinja file"


def template_text(chat_template: str) -> str:
    """The Jinja text behind a name or a path; Jinja text is returned as it is.

    A run asks once, before it starts, and goes on with the text: no step sees a file that changed meanwhile.

    Raises:
        RequestError: there is no such name and no such file, or the file is not text.
    """
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    file = _FOLDER / f"{chat_template}.jinja" if chat_template in TEMPLATES else Path(chat_template).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"There is no chat template {chat_template}. {CHOICES}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"formatting.chat_template {chat_template} cannot be read: {error}.") from error
    if "{{" not in text:
        raise RequestError(f"formatting.chat_template {chat_template} is no template: it writes out no message.")
    return text


def pin_chat_template(formatting: FormattingConfig) -> FormattingConfig:
    """The same with the template's text in place of its name or path, so that a changed file is a changed recipe."""
    if formatting.chat_template is None:
        return formatting
    return formatting.model_copy(update={"chat_template": template_text(formatting.chat_template)})


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Give the tokenizer the template that the recipe asks for; None leaves it its own.

    Raises:
        RequestError: as `template_text`, or the tokenizer has none of its own.
    """
    if chat_template is not None:
        text = template_text(chat_template)
        # What is rendered is tokenised without special tokens: the template writes the one that a text begins with.
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        is_own = text in [template_text(name) for name in TEMPLATES]
        tokenizer.chat_template = "{{ bos_token }}" + text if begins and is_own else text
    elif tokenizer.chat_template is None:
        raise RequestError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so nothing says how a conversation is "
            f"written for it. Choose one: {CHOICES}."
        )
