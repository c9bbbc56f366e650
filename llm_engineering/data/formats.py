"""Turns datasets of the known formats into canonical rows, one row at a time.

The columns of a record decide its format. A dataset that fits two formats is refused; the code never guesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from llm_engineering.data.conversations import (
    SYSTEM,
    TEXT_FORMATS,
    BadRowError,
    as_pairs,
    check_conversation,
    check_read,
    read_answer,
    read_messages,
    read_pairs,
    read_template,
    read_text,
    read_turns,
    text_templates,
    until_last_answer,
    with_system,
)
from llm_engineering.data.files import BrokenRecord, Record, printable, shown
from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, Row, is_blank, same_text
from llm_engineering.data.sources import dataset_hash, open_records
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig

__all__ = ["OpenedDataset", "dataset_hash", "open_dataset"]

# The first of these columns with a text says who wrote the answer.
_ORIGINS = ("origin", "model", "generator")
# Reads the messages of a record: `prompt` and `completion`, or `prompt`, `chosen` and `rejected`. Each answer begins with
# an assistant turn.
Reader = Callable[[dict[str, Any]], dict[str, list[Message]]]


class Format(NamedTuple):
    """A format.

    Attributes:
        columns: the columns that identify it.
        read: reads a record with these columns.
        also: other columns that `read` uses, beside the system message.
    """

    columns: frozenset[str]
    read: Reader
    also: frozenset[str] = frozenset()

    @property
    def reads(self) -> frozenset[str]:
        """All columns that a row is made of."""
        return self.columns | self.also | _COMMON


# Every format reads these columns. `label` is only read where it says that the answer is a good one.
_COMMON = frozenset({*SYSTEM, "document", *_ORIGINS})


def _alpaca_question(value: dict[str, Any], context: str = "input") -> Message:
    """The user turn: `instruction` and, if it is present, the column `context`."""
    instruction = read_text(value["instruction"], "instruction")
    if value.get(context) is None:
        return Message(role="user", content=instruction)
    extra = read_text(value[context], context)
    # With an empty `instruction` the question is in `input` alone, and must not begin with two empty lines.
    parts = [part for part in (instruction, extra) if not is_blank(part)]
    return Message(role="user", content="\n\n".join(parts) if parts else instruction)


def _alpaca(answer: str, context: str = "input") -> Reader:
    def read(value: dict[str, Any]) -> dict[str, list[Message]]:
        turns = [
            *_asked(value, [_alpaca_question(value, context)]),
            Message(role="assistant", content=read_text(value[answer], answer)),
        ]
        return _conversation(value, turns)

    return read


def _messages(name: str) -> Reader:
    return lambda value: _conversation(value, read_messages(value[name], name))


def _template(name: str) -> Reader:
    return lambda value: _conversation(value, read_template(read_text(value["text"], "text"), name))


def _prompt_completion(value: dict[str, Any]) -> dict[str, list[Message]]:
    prompt = with_system(value, _asked(value, read_turns(value["prompt"], "prompt", "user")))
    return _divided(prompt, until_last_answer(read_answer(value, "completion")))


def _conversation(value: dict[str, Any], messages: list[Message]) -> dict[str, list[Message]]:
    return _divided([], until_last_answer(with_system(value, messages)))


def _divided(prompt: list[Message], messages: list[Message]) -> dict[str, list[Message]]:
    """Cut a conversation before its first trained answer in `messages`."""
    first = next(index for index, message in enumerate(messages) if message.is_trained)
    prompt, completion = [*prompt, *messages[:first]], messages[first:]
    check_conversation(prompt, completion)
    return {"prompt": prompt, "completion": completion}


def _asked(value: dict[str, Any], prompt: list[Message]) -> list[Message]:
    """The turns of `history`, and the prompt."""
    return [*read_pairs(value.get("history"), "history"), *prompt]


_HISTORY = frozenset({"history"})
_QUESTION = frozenset({"history", "input"})
INSTRUCTION_FORMATS = {
    "alpaca": Format(frozenset({"instruction", "output"}), _alpaca("output"), _QUESTION),
    "alpaca-response": Format(frozenset({"instruction", "response"}), _alpaca("response"), _QUESTION),
    "alpaca-answer": Format(frozenset({"instruction", "answer"}), _alpaca("answer"), _QUESTION),
    "dolly": Format(frozenset({"instruction", "context", "response"}), _alpaca("response", "context"), _HISTORY),
    "messages": Format(frozenset({"messages"}), _messages("messages")),
    "sharegpt": Format(frozenset({"conversations"}), _messages("conversations")),
    "prompt-completion": Format(frozenset({"prompt", "completion"}), _prompt_completion, _HISTORY),
    **{name: Format(frozenset({"text"}), _template(name)) for name in TEXT_FORMATS},
}


def _prompt_chosen_rejected(value: dict[str, Any]) -> dict[str, list[Message]]:
    chosen, rejected = _answers(value)
    question = read_turns(value["prompt"], "prompt", "user")
    is_text = [turn.content for turn in question] == [value["prompt"]]
    if not is_text or (len(chosen) == 1 and len(rejected) == 1):
        return _pair(value, _asked(value, question), chosen, rejected)
    prompt, chosen, rejected = _split_conversations(chosen, rejected)
    if not any(same_text(turn.content, value["prompt"]) for turn in prompt if turn.role == "user"):
        raise BadRowError("different_prompts", "`prompt` is no user turn of the two conversations")
    return _pair(value, _asked(value, prompt), chosen, rejected)


def _answers(
    value: dict[str, Any], chosen: str = "chosen", rejected: str = "rejected"
) -> tuple[list[Message], list[Message]]:
    return until_last_answer(read_answer(value, chosen)), until_last_answer(read_answer(value, rejected))


def _split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two whole conversations into the turns that both begin with, and the rest of each."""
    if len(chosen) == 1 or len(rejected) == 1:
        raise BadRowError(
            "no_prompt",
            "its answers have no prompt; if the column NAME holds the prompt, set data.columns.prompt=NAME",
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair(
    value: dict[str, Any], prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> dict[str, list[Message]]:
    chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        raise BadRowError("different_prompts", "the conversations of the two answers do not begin with the same turns")
    if not all(turn.is_trained for turn in (*chosen, *rejected) if turn.role == "assistant"):
        raise BadRowError("loss_weight", "a part of its answers has the weight 0; pairs compare whole answers")
    prompt = with_system(value, prompt)
    check_conversation(prompt, chosen)
    check_conversation(prompt, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without_prompt(prompt: list[Message], answer: list[Message]) -> list[Message]:
    repeats_prompt = len(answer) > len(prompt) and all(map(_same, answer, prompt))
    return answer[len(prompt) :] if repeats_prompt else answer


def _same(one: Message, other: Message) -> bool:
    return one.role == other.role and same_text(one.content, other.content)


def _openai_preference(value: dict[str, Any]) -> dict[str, list[Message]]:
    if isinstance(value["input"], dict) and value["input"].get("tools"):
        raise BadRowError("tool_call", "`input` offers tools, which are not trained")
    chosen, rejected = _answers(value, "preferred_output", "non_preferred_output")
    return _pair(value, read_messages(value["input"], "input"), chosen, rejected)


PREFERENCE_FORMATS = {
    "prompt-chosen-rejected": Format(frozenset({"prompt", "chosen", "rejected"}), _prompt_chosen_rejected, _HISTORY),
    "chosen-rejected": Format(
        frozenset({"chosen", "rejected"}), lambda value: _pair(value, *_split_conversations(*_answers(value)))
    ),
    "sharegpt-preference": Format(
        frozenset({"conversations", "chosen", "rejected"}),
        lambda value: _pair(value, read_messages(value["conversations"], "conversations"), *_answers(value)),
    ),
    "alpaca-preference": Format(
        frozenset({"instruction", "chosen", "rejected"}),
        lambda value: _pair(value, _asked(value, [_alpaca_question(value)]), *_answers(value)),
        _QUESTION,
    ),
    "openai-preference": Format(frozenset({"input", "preferred_output", "non_preferred_output"}), _openai_preference),
}

# The format is detected from this many rows at the start.
PEEKED_ROWS = 100
_FORMATS = INSTRUCTION_FORMATS | PREFERENCE_FORMATS
_KIND = {**dict.fromkeys(INSTRUCTION_FORMATS, "instruction"), **dict.fromkeys(PREFERENCE_FORMATS, "preference")}
# The columns that data.columns can map, by the kind of the dataset.
_MAPPABLE = {
    kind: frozenset({"input", "system", "history", "document", "origin"}).union(*(f.columns for f in formats.values()))
    for kind, formats in (("instruction", INSTRUCTION_FORMATS), ("preference", PREFERENCE_FORMATS))
}
# The data report names this many of the columns that no row was made of.
_UNREAD_NAMED = 50


class UnknownFormatError(RequestError):
    """No format has the columns of a dataset."""


class OpenedDataset(NamedTuple):
    """A dataset whose format is known.

    Attributes:
        kind: `instruction` or `preference`.
        format: the formats of its first rows, e.g. `alpaca`, or `alpaca and messages`.
        rows: a row or a quarantine record for every record of the dataset, read from the file on demand.
        unread: the first _UNREAD_NAMED columns that no format read, among the rows so far.
    """

    kind: str
    format: str
    rows: Iterator[Row | Quarantined]
    unread: list[str]


def open_dataset(reference: str, kind: str | None, config: DataConfig) -> OpenedDataset:
    """Open a dataset and detect its format from its first rows.

    Args:
        reference: a file, a folder, or a hub id; `#name` after it selects one of several splits.
        kind: `instruction` or `preference`; None detects it.
        config: `format` requires a format (a format of the other kind is ignored: it belongs to the recipe's other
            dataset). `columns` maps standard column names to those of the file.

    Raises:
        RequestError: the dataset is missing, empty or damaged, its format is unknown or ambiguous, or it lacks a mapped
            column. If a file is damaged further inside, `rows` raises the error when it reaches the damage.
    """
    required = config.format if config.format and kind in (None, _KIND[config.format]) else None
    columns = _columns_of(config.columns, kind)
    records = open_records(reference)
    unmapped = list(islice(records, PEEKED_ROWS))
    if not unmapped:
        raise RequestError(f"{reference} is empty: there is no row in it.")
    _check_mapped(reference, columns, unmapped)
    peeked = list(chain.from_iterable(_pairs(_renamed(record, columns)) for record in unmapped))
    readable = [record for record in peeked if isinstance(record, Record)]
    if not readable:
        problem = next(record for record in peeked if isinstance(record, BrokenRecord)).quarantined("row")
        raise RequestError(f"{reference} holds no row that can be read; the first problem: {problem.describe()}.")
    names = Counter(chain.from_iterable(_detected(reference, record, kind, required) for record in readable))
    if not names:
        raise _unknown(reference, kind, required, readable[0])
    kinds = {_KIND[name] for name in names}
    if len(kinds) > 1:
        raise _ambiguous(reference, sorted(names))
    found = kinds.pop()
    rest = chain.from_iterable(_pairs(_renamed(record, columns)) for record in records)
    unread: list[str] = []
    rows = (_row(record, found, required, unread) for record in chain(peeked, rest))
    return OpenedDataset(found, " and ".join(name for name, _ in names.most_common()), rows, unread)


def _columns_of(mapping: dict[str, str], kind: str | None) -> dict[str, str]:
    known = _MAPPABLE["instruction"] | _MAPPABLE["preference"]
    for name in mapping:
        if name not in known:
            raise RequestError(
                f"data.columns maps {name}, which is no standard column: it maps a standard name to the file's own, "
                f"and the standard names are {', '.join(sorted(known))}."
            )
    return {name: own for name, own in mapping.items() if kind is None or name in _MAPPABLE[kind]}


def _renamed(record: Record | BrokenRecord, columns: dict[str, str]) -> Record | BrokenRecord:
    if not columns or isinstance(record, BrokenRecord):
        return record
    renamed = {name: record.value[own] for name, own in columns.items() if own in record.value}
    others = {key: value for key, value in record.value.items() if key not in columns.values()}
    return record._replace(value={**others, **renamed})


def _pairs(record: Record | BrokenRecord) -> list[Record | BrokenRecord]:
    """The records of the pairs of a record with several answers; any other record unchanged."""
    if isinstance(record, BrokenRecord):
        return [record]
    value, file, place = record
    try:
        values = as_pairs(value)
    except BadRowError as error:
        return [BrokenRecord(file, place, error.reason, error.detail, shown(value))]
    places = [place] if len(values) == 1 else [f"{place}, pair {number}" for number in range(1, len(values) + 1)]
    return [Record(one, file, where) for one, where in zip(values, places, strict=True)]


def _check_mapped(reference: str, columns: dict[str, str], records: Sequence[Record | BrokenRecord]) -> None:
    present = list(dict.fromkeys(key for record in records if isinstance(record, Record) for key in record.value))
    for name, own in columns.items():
        if present and own not in present:
            raise RequestError(
                f"data.columns maps {name} to {own}, but the first rows of {reference} have no such column: they have "
                f"{printable(', '.join(present)) or 'none'}."
            )


def _detected(reference: str, record: Record, kind: str | None, required: str | None) -> tuple[str, ...]:
    """The format of one of the first records, as a tuple of one name; empty if it is unknown."""
    if required is not None:
        return (required,) if _FORMATS[required].columns <= record.value.keys() else ()
    names = _fitting(record.value, kind)
    if len(names) > 1:
        raise _ambiguous(f"{reference} ({record.place})", names)
    return names or _fitting_with_nulls(record.value, kind)[:1]


def _fitting(value: dict[str, Any], kind: str | None) -> tuple[str, ...]:
    """The formats of a kind that fit a record's columns. A column whose value is null counts as absent."""
    names = _formats_with(tuple([name for name, content in value.items() if content is not None]))
    if not names and isinstance(value.get("text"), str):
        # Templates come last, because many datasets have their own columns and also the same row rendered as `text`.
        names = text_templates(value["text"])
    return tuple([name for name in names if kind in (None, _KIND[name])])


def _fitting_with_nulls(value: dict[str, Any], kind: str | None) -> tuple[str, ...]:
    return tuple(name for name in _formats_with(tuple(value)) if kind in (None, _KIND[name]))


@lru_cache(maxsize=1024)
def _formats_with(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The formats whose columns are all present, without formats that need only a part of another one's columns."""
    present = frozenset(columns)
    names = [name for name, f in _FORMATS.items() if f.columns <= present and f.columns != {"text"}]
    return tuple(n for n in names if not any(_FORMATS[n].columns < _FORMATS[other].columns for other in names))


def _row(record: Record | BrokenRecord, kind: str, required: str | None, unread: list[str]) -> Row | Quarantined:
    if isinstance(record, BrokenRecord):
        return record.quarantined(kind)
    value, file, place = record
    try:
        format_ = _FORMATS[_format_of(value, kind, required)]
        names = [printable(name) for name in value if name not in format_.reads]
        unread += [name for name in names if name not in unread][: _UNREAD_NAMED - len(unread)]
        fields = {
            **format_.read(value),
            "source": printable(f"{file.rpartition('/')[2]}:{place}"),
            "origin": _origin(value),
            "document": _document(value),
        }
        # A label of KTO's that is true says that the answer is a good one.
        check_read(value, {*format_.reads, "label"} if value.get("label") is True else format_.reads, "it")
    except BadRowError as error:
        return BrokenRecord(file, place, error.reason, error.detail, shown(value)).quarantined(kind)
    return InstructionRow.model_validate(fields) if kind == "instruction" else PreferenceRow.model_validate(fields)


def _format_of(value: dict[str, Any], kind: str, required: str | None) -> str:
    names = (required,) if required is not None else _fitting(value, kind)
    if len(names) > 1:
        raise BadRowError("malformed", f"it can be read as {' or as '.join(names)}: name one in data.format")
    names = names or _fitting_with_nulls(value, kind)
    if not names and kind == "instruction" and "text" in value:
        read_text(value["text"], "text")
        raise BadRowError("malformed", "its `text` is written in no known template")
    if not names:
        raise BadRowError("malformed", f"no {kind} format has the columns {', '.join(value) or '(none)'}")
    missing = sorted(name for name in _FORMATS[names[0]].columns if value.get(name) is None)
    if missing and missing[0] in value:
        raise BadRowError("null_value", f"`{missing[0]}` is null")
    if missing:
        raise BadRowError("malformed", f"`{missing[0]}` is missing, and {names[0]} needs it")
    return names[0]


def _origin(value: dict[str, Any]) -> str:
    names = (value.get(key) for key in _ORIGINS)
    return next((name for name in names if name and isinstance(name, str)), "unknown")


def _document(value: dict[str, Any]) -> str:
    name = value.get("document")
    # The name groups rows and is not trained on, so a number is accepted too.
    return str(name) if isinstance(name, (str, int)) else ""


def _ambiguous(what: str, names: Sequence[str]) -> RequestError:
    choices = " or ".join(f"data.format={name}" for name in names)
    return RequestError(f"{what} can be read as {' or as '.join(names)}: choose one with {choices}.")


def _unknown(reference: str, kind: str | None, required: str | None, first: Record) -> RequestError:
    present = printable(", ".join(first.value)) or "none"
    if required is not None:
        needed = ", ".join(sorted(_FORMATS[required].columns))
        return RequestError(
            f"{reference} is not in the format that data.format asks for: {required} has the columns {needed}, its "
            f"first row has {present}. Name another format, or map columns with data.columns."
        )
    other = _fitting(first.value, None)
    if other:
        return RequestError(
            f"{reference} is in no known {kind} format: it holds {_KIND[other[0]]} rows ({' or as '.join(other)}). Name "
            f"it under data.{_KIND[other[0]]}s."
        )
    known = "; ".join(
        f"{name}: {', '.join(sorted(columns))}"
        for name, (columns, _, _) in _FORMATS.items()
        if kind in (None, _KIND[name])
    )
    return UnknownFormatError(
        f"{reference} is in no known {f'{kind} ' if kind else ''}format: its first row has the columns {present}. Known "
        f"formats are {known}. A `text` must follow the template of its format. Map other column names with "
        "data.columns, e.g. --set data.columns.prompt=NAME."
    )
