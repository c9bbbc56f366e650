"""A row as its pages show it: its texts, its tokens with their labels, and its place in the source document."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import LabelledRow, Message, PreferenceRow, PromptRow, Row, TextRow, is_blank, read_row
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import place_in
from llm_engineering.errors import RequestError
from llm_engineering.feedback.decisions import content_of
from llm_engineering.formatting.datasets import format_rows
from llm_engineering.formatting.labels import label_views
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.recipe.data_blocks import FormattingConfig

# Characters of a text on a page with many rows, and on the page of one row, before it is cut.
LISTED_CHARS, SHOWN_CHARS = 1500, 20_000
# Characters of the document around a passage.
_AROUND = 1500
# Tokens of a row that are shown one by one.
_SHOWN_TOKENS = 4000
_ROLES = {"system": "system", "user": "question", "assistant": "answer"}


class Part(NamedTuple):
    """One text of a row.

    Attributes:
        path: where the text stands in the row's content, e.g. `prompt.0.content`.
        name: what it is, e.g. `question` or `rejected answer`.
        role: `question`, `answer`, `rejected` or `other`, for its colour.
    """

    path: str
    name: str
    role: str
    text: str


def parts_of(row: Row) -> list[Part]:
    """The texts of a row in their order."""
    if isinstance(row, TextRow):
        return [Part("text", "text", "answer", row.text)]
    parts = _turns(row.prompt, "prompt", "")
    if isinstance(row, PromptRow):
        return parts + [Part(f"answers.{n}", "accepted answer", "answer", text) for n, text in enumerate(row.accepted)]
    if isinstance(row, PreferenceRow):
        return parts + _turns(row.chosen, "chosen", "chosen ") + _turns(row.rejected, "rejected", "rejected ")
    return parts + _turns(row.completion, "completion", "")


def _turns(messages: list[Message], column: str, prefix: str) -> list[Part]:
    parts = []
    for number, message in enumerate(messages):
        name = prefix + _ROLES[message.role] + (", not trained" if message.weight == 0 else "")
        role = "rejected" if column == "rejected" else {"system": "other"}.get(message.role, _ROLES[message.role])
        if message.reasoning_content is not None:
            reasoning = message.reasoning_content
            parts.append(
                Part(f"{column}.{number}.reasoning_content", f"reasoning before the {name}", "other", reasoning)
            )
        parts.append(Part(f"{column}.{number}.content", name, role, message.content))
    return parts


def with_texts(row: Row, kind: str, texts: dict[str, str]) -> Row:
    """The row with other texts, by their `path`. The label of a labelled row has the path `label`.

    Raises:
        RequestError: nothing differs, a text is empty, or the row has no text with this path.
    """
    content = content_of(row)
    paths = {part.path for part in parts_of(row)}
    for path, text in texts.items():
        if path == "label" and isinstance(row, LabelledRow):
            content["label"] = text == "good"
            continue
        if path not in paths:
            raise RequestError(f"The row has no text {path}. Reload the page.")
        if is_blank(text):
            raise RequestError("A text of the row would be empty. Write one, or drop the row.")
        *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        inner: Any = content
        for key in keys:
            inner = inner[key]
        inner[last] = text
    names = {"source": row.source, "origin": row.origin, "document": row.document}
    changed = read_row({**content, **names}, kind)
    if changed.id == row.id:
        raise RequestError("The texts are as they were. Change one, or accept the row.")
    return changed


class Tokens(NamedTuple):
    """The tokens of a row, or of one of its answers: the text of each, and whether it is trained."""

    name: str
    tokens: list[tuple[str, bool]]
    prompt: str
    more: int


def token_views(
    row: Row, kind: str, tokenizer: PreTrainedTokenizerBase, formatting: FormattingConfig
) -> tuple[list[Tokens], str]:
    """The tokens of a row as training reads them, and why the row is not trained on, or how it is cut; empty if it is not.

    Raises:
        WorkError: there is no chat template.
    """
    # With `raise`, an over-long row would end the server.
    shown = formatting.model_copy(update={"over_long": "drop"}) if formatting.over_long == "raise" else formatting
    (formatted,) = format_rows([row], kind, tokenizer, shown)
    views = [
        _tokens(name, ids, labels, tokenizer)
        for record in formatted.records
        for name, ids, labels in _labelled_ids(record)
    ]
    rejected = formatted.rejected
    return views, f"{rejected.reason}: {rejected.detail}" if rejected is not None else formatted.truncated


def _labelled_ids(record: dict[str, Any]) -> list[tuple[str, list[int], list[int]]]:
    if "input_ids" in record:
        return [("row", record["input_ids"], record["labels"])]
    prompt = list(record["prompt_ids"])
    masked = [IGNORE_INDEX] * len(prompt)
    names = {"chosen_ids": "chosen answer", "rejected_ids": "rejected answer", "completion_ids": "answer"}
    answers = [(name, list(record[column])) for column, name in names.items() if column in record]
    return [(name, prompt + ids, masked + ids) for name, ids in answers] or [("prompt", prompt, masked)]


def _tokens(name: str, ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    (view,) = label_views([(ids[:_SHOWN_TOKENS], labels[:_SHOWN_TOKENS])], tokenizer)
    trained = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
    return Tokens(name, view, str(tokenizer.decode(ids[:trained])), max(0, len(ids) - _SHOWN_TOKENS))


class Place(NamedTuple):
    """A passage with the text of its document around it."""

    title: str
    before: str
    passage: str
    after: str
    is_whole: bool


def place_of(row: Row, document: Document, whole: bool) -> Place:
    """The place of a row in its document. Without a known place, `passage` is empty and `after` is the document's start."""
    start, end = place_in(document, row.source) or (0, 0)
    first, last = (0, len(document.text)) if whole else (max(0, start - _AROUND), end + _AROUND)
    texts = document.text[first:start], document.text[start:end], document.text[end:last]
    return Place(document.title, *texts, is_whole=first == 0 and last >= len(document.text))
