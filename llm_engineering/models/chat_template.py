"""Reads chat templates: the named ones of this project, and Jinja files.

The project's templates add no token to the model, so they fit any base model: they only append text, and end every
answer with the tokenizer's own end token.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))
_CHOICES = f"formatting.chat_template takes {', '.join(TEMPLATES)}, or the path of a Jinja file"


def template_text(chat_template: str) -> str:
    """The Jinja text of a template's name or path. Jinja text is returned unchanged.

    Raises:
        RequestError: there is no template of this name and no such file, or the file holds no Jinja text.
    """
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    file = _FOLDER / f"{chat_template}.jinja" if chat_template in TEMPLATES else Path(chat_template).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"There is no chat template {chat_template}. {_CHOICES}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"formatting.chat_template {chat_template} cannot be read: {error}.") from error
    if "{{" not in text:
        raise RequestError(
            f"formatting.chat_template {chat_template} is not a chat template: it has no double braces, so it writes "
            f"no message. {_CHOICES}."
        )
    return text


def pin_chat_template(
    formatting: FormattingConfig, model: ModelConfig | None = None, settings: Settings | None = None
) -> FormattingConfig:
    """Replace the template's name or path by its text, with `template_date` in it.

    A run does this before its first step: all steps use the same text, and a changed file or date counts as a changed recipe.

    Args:
        model: has the template if the recipe names none; None leaves the date of the model's own template to the run.

    Raises:
        RequestError: there is no such template, or it asks for no date although `template_date` is set.
    """
    text = template_text(formatting.chat_template) if formatting.chat_template is not None else None
    chosen = formatting.template_date
    if text is None and chosen is not None and model is not None:
        assert settings is not None
        # transformers takes seconds to import, and a template of the recipe does without.
        from transformers import AutoTokenizer

        from llm_engineering.models.base_model import hub_options, model_path

        tokenizer = AutoTokenizer.from_pretrained(model_path(model, settings), **hub_options(model, settings))
        if tokenizer.chat_template is None:
            raise without_template(tokenizer)
        text = str(tokenizer.get_chat_template())
    if text is None:
        return formatting
    if chosen is not None:
        dated = with_fixed_date(text, chosen)
        if dated == text:
            raise RequestError(
                f"formatting.template_date {chosen} has no effect, because the chat template does not ask for today's date "
                "with strftime_now. Remove the key."
            )
        text = dated
    return formatting.model_copy(update={"chat_template": text, "template_date": None})


# The date that a chat template writes where it asks for today's. It is the one that Llama 3.2's template writes where it
# cannot ask. With today's date, training, evaluation and serving would differ from day to day.
TEMPLATE_DATE = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def with_fixed_date(template: str, fixed: date = TEMPLATE_DATE) -> str:
    """The template with a date in place of each call of `strftime_now`, also for servers that do not have this function.

    Raises:
        RequestError: the template calls it with another argument than a text.
    """
    template = _TODAY.sub(lambda call: repr(fixed.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", template):
        raise RequestError(
            "The chat template writes today's date in a format that it computes, so prompts would change from day to day. "
            "Write a date into a copy of the template, and name its file in formatting.chat_template."
        )
    return re.sub(r"strftime_now\s+is\s+(not\s+)?defined", lambda test: "false" if test[1] else "true", template)


def without_template(tokenizer: PreTrainedTokenizerBase) -> RequestError:
    """The error for a tokenizer that has no chat template."""
    return RequestError(
        f"The tokenizer of {tokenizer.name_or_path} has no chat template, so conversations cannot be rendered for it. "
        f"Choose one: {_CHOICES}."
    )
