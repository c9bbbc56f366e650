"""The chat template that a recipe asks for: the model's own, one of the project's by name, or a Jinja file.

The project's templates only append, and end every answer with the tokenizer's end token, so that any base model can be
trained with them: no token is added to the model.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from llm_engineering.config import FormattingConfig
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.formatting.render import render

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


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render two turns, so that a template that cannot be trained with is told before any work.

    Raises:
        RequestError: it is no Jinja, changes what it has written, or does not end answers with the end token.
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
