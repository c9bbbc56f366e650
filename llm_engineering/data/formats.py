"""Turns the formats that people have into canonical rows, one row at a time.

The columns of a record decide its format. A request that fits two formats is refused; nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from llm_engineering.data.conversations import (
    BadRowError,
    check_conversation,
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
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.data.sources import dataset_hash, open_records
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig

# Prompt and completion; the completion begins with an assistant turn.
Instruction = tuple[list[Message], list[Message]]


def alpaca_question(value: dict[str, Any], context: str = "input") -> Message:
    """The user turn of a record with `instruction` and, where there is one, `input`."""
    instruction = read_text(value["instruction"], "instruction")
    if value.get(context) is None:
        return Message(role="user", content=instruction)
    extra = read_text(value[context], context)
    # A question that stands in `input` alone is no reason to begin with two empty lines.
    parts = [part for part in (instruction, extra) if part.strip()]
    return Message(role="user", content="\n\n".join(parts) if parts else instruction)


def _alpaca(answer: str, context: str = "input") -> Callable[[dict[str, Any]], Instruction]:
    def read(value: dict[str, Any]) -> Instruction:
        turns = [
            *read_pairs(value.get("history"), "history"),
            alpaca_question(value, context),
            Message(role="assistant", content=read_text(value[answer], answer)),
        ]
        return _conversation(with_system(value, turns))

    return read


def _messages(name: str) -> Callable[[dict[str, Any]], Instruction]:
    return lambda value: _conversation(with_system(value, read_messages(value[name], name)))


def _template(name: str) -> Callable[[dict[str, Any]], Instruction]:
    return lambda value: _conversation(with_system(value, read_template(read_text(value["text"], "text"), name)))


def _prompt_completion(value: dict[str, Any]) -> Instruction:
    prompt = with_system(value, read_turns(value["prompt"], "prompt", "user"))
    completion = until_last_answer(read_turns(value["completion"], "completion", "assistant"))
    check_conversation(prompt, completion)
    return prompt, completion


def _conversation(messages: list[Message]) -> Instruction:
    messages = until_last_answer(messages)
    first = next(index for index, message in enumerate(messages) if message.role == "assistant")
    prompt, completion = messages[:first], messages[first:]
    check_conversation(prompt, completion)
    return prompt, completion


# The columns that each format is known by, and what reads a record that has them.
INSTRUCTION_FORMATS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Instruction]]] = {
    "alpaca": (frozenset({"instruction", "output"}), _alpaca("output")),
    "alpaca-response": (frozenset({"instruction", "response"}), _alpaca("response")),
    "alpaca-answer": (frozenset({"instruction", "answer"}), _alpaca("answer")),
    "dolly": (frozenset({"instruction", "context", "response"}), _alpaca("response", context="context")),
    "messages": (frozenset({"messages"}), _messages("messages")),
    "sharegpt": (frozenset({"conversations"}), _messages("conversations")),
    "prompt-completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "text-alpaca": (frozenset({"text"}), _template("text-alpaca")),
    "text-human-assistant": (frozenset({"text"}), _template("text-human-assistant")),
    "text-inst": (frozenset({"text"}), _template("text-inst")),
}


# Prompt, chosen and rejected answer; both answers begin with an assistant turn.
Preference = tuple[list[Message], list[Message], list[Message]]


def _prompt_chosen_rejected(value: dict[str, Any]) -> Preference:
    chosen, rejected = _answers(value)
    if isinstance(value["prompt"], str):
        if len(chosen) == 1 and len(rejected) == 1:
            return _pair(value, [Message(role="user", content=value["prompt"])], chosen, rejected)
        prompt, chosen, rejected = _whole_conversations(chosen, rejected)
        asked = value["prompt"].strip()
        if all(turn.content.strip() != asked for turn in prompt if turn.role == "user"):
            raise BadRowError("different_prompts", "`prompt` is no user turn of the two conversations")
        return _pair(value, prompt, chosen, rejected)
    return _pair(value, read_turns(value["prompt"], "prompt", "user"), chosen, rejected)


def _chosen_rejected(value: dict[str, Any]) -> Preference:
    chosen, rejected = _answers(value)
    return _pair(value, *_whole_conversations(chosen, rejected))


def _sharegpt(value: dict[str, Any]) -> Preference:
    return _pair(value, read_messages(value["conversations"], "conversations"), *_answers(value))


def _alpaca_pair(value: dict[str, Any]) -> Preference:
    return _pair(value, [alpaca_question(value)], *_answers(value))


def _answers(value: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    chosen = until_last_answer(read_turns(value["chosen"], "chosen", "assistant"))
    rejected = until_last_answer(read_turns(value["rejected"], "rejected", "assistant"))
    return chosen, rejected


def _whole_conversations(chosen: list[Message], rejected: list[Message]) -> Preference:
    """The turns that both conversations begin with, and what follows in each."""
    if len(chosen) == 1 or len(rejected) == 1:
        raise BadRowError(
            "no_prompt", "its answers have no prompt; where it stands in another column, name that in data.columns"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair(value: dict[str, Any], prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Preference:
    chosen, rejected = _after(prompt, chosen), _after(prompt, rejected)
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        raise BadRowError("different_prompts", "the conversations of the two answers do not begin with the same turns")
    prompt = with_system(value, prompt)
    check_conversation(prompt, chosen)
    check_conversation(prompt, rejected)
    return prompt, chosen, rejected


def _after(prompt: list[Message], answer: list[Message]) -> list[Message]:
    repeats_prompt = len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeats_prompt else answer


# The columns that each format is known by, and what reads a record that has them.
PREFERENCE_FORMATS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Preference]]] = {
    "prompt-chosen-rejected": (frozenset({"prompt", "chosen", "rejected"}), _prompt_chosen_rejected),
    "chosen-rejected": (frozenset({"chosen", "rejected"}), _chosen_rejected),
    "sharegpt-preference": (frozenset({"conversations", "chosen", "rejected"}), _sharegpt),
    "alpaca-preference": (frozenset({"instruction", "chosen", "rejected"}), _alpaca_pair),
}


__all__ = ["OpenedDataset", "dataset_hash", "open_dataset"]

# Rows that are looked at to recognise the format.
PEEKED_ROWS = 100
_COLUMNS = {
    **{name: columns for name, (columns, _) in INSTRUCTION_FORMATS.items()},
    **{name: columns for name, (columns, _) in PREFERENCE_FORMATS.items()},
}
_KIND = {**dict.fromkeys(INSTRUCTION_FORMATS, "instruction"), **dict.fromkeys(PREFERENCE_FORMATS, "preference")}
# The columns that data.columns can map, by the kinds of datasets that have them.
_MAPPABLE = {
    "instruction": frozenset({"input", "system", "history", "document", "origin"}).union(
        *(columns for columns, _ in INSTRUCTION_FORMATS.values())
    ),
    "preference": frozenset({"input", "system", "document", "origin"}).union(
        *(columns for columns, _ in PREFERENCE_FORMATS.values())
    ),
}


class UnknownFormatError(RequestError):
    """No format has the columns of a dataset."""


class OpenedDataset(NamedTuple):
    """A dataset whose format is known.

    Attributes:
        kind: `instruction` or `preference`.
        format: the format of its first rows, e.g. `alpaca`, or `alpaca and messages`.
        rows: every record as a row or, by name, as quarantined; read from the file as they are asked for.
    """

    kind: str
    format: str
    rows: Iterator[InstructionRow | PreferenceRow | Quarantined]


def open_dataset(reference: str, kind: str | None, config: DataConfig) -> OpenedDataset:
    """Open a dataset and recognise its format from its first rows.

    Args:
        reference: a file, a folder, or a hub id; `#name` behind it names one of several splits.
        kind: `instruction` or `preference`; None recognises it.
        config: `format` insists on a format (of this kind: the other one is meant for the recipe's other dataset),
            `columns` maps standard names of columns to those of the file.

    Raises:
        RequestError: the dataset is missing, empty, damaged, in no known format or in one of several, or lacks a
            mapped column. Damage further inside a file is raised when `rows` reach it.
    """
    insisted = config.format if config.format and kind in (None, _KIND[config.format]) else None
    columns = _columns_of(config.columns, kind)
    records = open_records(reference)
    unmapped = list(islice(records, PEEKED_ROWS))
    if not unmapped:
        raise RequestError(f"{reference} is empty: there is no row in it.")
    _check_mapped(reference, columns, unmapped)
    peeked = [_renamed(record, columns) for record in unmapped]
    first = [record for record in peeked if isinstance(record, Record)]
    if not first:
        problem = next(record for record in peeked if isinstance(record, BrokenRecord)).quarantined("row")
        raise RequestError(f"{reference} holds no row that can be read; the first problem: {problem.named()}.")
    names = Counter(chain.from_iterable(_readings_of(reference, record, kind, insisted) for record in first))
    if not names:
        raise _unknown(reference, kind, insisted, first[0])
    kinds = {_KIND[name] for name in names}
    if len(kinds) > 1:
        raise _ambiguous(reference, sorted(names))
    found = kinds.pop()
    rest = (_renamed(record, columns) for record in records)
    rows = (_row(record, found, insisted) for record in chain(peeked, rest))
    return OpenedDataset(found, " and ".join(name for name, _ in names.most_common()), rows)


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


def _check_mapped(reference: str, columns: dict[str, str], records: Sequence[Record | BrokenRecord]) -> None:
    there = list(dict.fromkeys(key for record in records if isinstance(record, Record) for key in record.value))
    for name, own in columns.items():
        if there and own not in there:
            raise RequestError(
                f"data.columns maps {name} to {own}, and the first rows of {reference} have no such column: they have "
                f"{printable(', '.join(there)) or 'none'}."
            )


def _readings_of(reference: str, record: Record, kind: str | None, insisted: str | None) -> tuple[str, ...]:
    """The format that a record counts for while the dataset's format is recognised; none for an unknown one."""
    if insisted is not None:
        return (insisted,) if _COLUMNS[insisted] <= record.value.keys() else ()
    found = _readings(record.value, kind)
    if len(found) > 1:
        raise _ambiguous(f"{reference} ({record.place})", found)
    return found or _with_nulls(record.value, kind)[:1]


def _readings(value: dict[str, Any], kind: str | None) -> tuple[str, ...]:
    """The formats of a kind that a record's columns fit; a column without a value is as good as not there."""
    found = _formats_with(tuple([name for name, content in value.items() if content is not None]))
    if not found and isinstance(value.get("text"), str):
        # Last, because many datasets with columns of their own also carry them rendered as text.
        found = text_templates(value["text"])
    return found if kind is None else tuple([name for name in found if _KIND[name] == kind])


def _with_nulls(value: dict[str, Any], kind: str | None) -> tuple[str, ...]:
    return tuple(name for name in _formats_with(tuple(value)) if kind is None or _KIND[name] == kind)


@lru_cache(maxsize=1024)
def _formats_with(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The formats whose columns are all there, without those that ask for a part of another one's columns."""
    there = frozenset(columns)
    found = [name for name, needed in _COLUMNS.items() if needed <= there and needed != {"text"}]
    return tuple(name for name in found if not any(_COLUMNS[name] < _COLUMNS[other] for other in found))


def _row(
    record: Record | BrokenRecord, kind: str, insisted: str | None
) -> InstructionRow | PreferenceRow | Quarantined:
    if isinstance(record, BrokenRecord):
        return record.quarantined(kind)
    value, file, place = record
    try:
        name = _format_of(value, kind, insisted)
        source = f"{file.rpartition('/')[2]}:{place}"
        origin, document = _origin(value), _document(value)
        if kind == "instruction":
            prompt, completion = INSTRUCTION_FORMATS[name][1](value)
            return InstructionRow(
                prompt=prompt, completion=completion, source=printable(source), origin=origin, document=document
            )
        prompt, chosen, rejected = PREFERENCE_FORMATS[name][1](value)
        return PreferenceRow(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=printable(source),
            origin=origin,
            document=document,
        )
    except BadRowError as error:
        return BrokenRecord(file, place, error.reason, error.detail, shown(value)).quarantined(kind)


def _format_of(value: dict[str, Any], kind: str, insisted: str | None) -> str:
    found = (insisted,) if insisted is not None else _readings(value, kind)
    if len(found) > 1:
        raise BadRowError("malformed", f"it can be read as {_either(found)}: name one in data.format")
    found = found or _with_nulls(value, kind)
    if not found and kind == "instruction" and "text" in value:
        read_text(value["text"], "text")
        raise BadRowError("malformed", "its `text` is written in no known template")
    if not found:
        raise BadRowError("malformed", f"no {kind} format has the columns {', '.join(value) or '(none)'}")
    missing = sorted(name for name in _COLUMNS[found[0]] if value.get(name) is None)
    if missing and missing[0] in value:
        raise BadRowError("null_value", f"`{missing[0]}` is null")
    if missing:
        raise BadRowError("malformed", f"`{missing[0]}` is not there, and {found[0]} needs it")
    return found[0]


def _origin(value: dict[str, Any]) -> str:
    for key in ("origin", "model", "generator"):
        given = value.get(key)
        if given and isinstance(given, str):
            return given
    return "unknown"


def _document(value: dict[str, Any]) -> str:
    given = value.get("document")
    # It groups rows and is not learned, so a number is as good a name as a word.
    return str(given) if isinstance(given, (str, int)) else ""


def _either(names: tuple[str, ...] | list[str]) -> str:
    return " or as ".join(names)


def _ambiguous(what: str, names: tuple[str, ...] | list[str]) -> RequestError:
    choices = " or ".join(f"data.format={name}" for name in names)
    return RequestError(f"{what} can be read as {_either(names)}: say which is meant with {choices}.")


def _unknown(reference: str, kind: str | None, insisted: str | None, first: Record) -> RequestError:
    there = printable(", ".join(first.value)) or "none"
    if insisted is not None:
        needed = ", ".join(sorted(_COLUMNS[insisted]))
        return RequestError(
            f"{reference} is not in the format that data.format asks for: {insisted} has the columns {needed}, its "
            f"first row has {there}. Name another format, or map columns with data.columns."
        )
    other = _readings(first.value, None)
    if other:
        return RequestError(
            f"{reference} is in no known {kind} format: it holds {_KIND[other[0]]} rows ({_either(other)}). Name it "
            f"under data.{_KIND[other[0]]}s."
        )
    known = "; ".join(
        f"{name}: {', '.join(sorted(columns))}" for name, columns in _COLUMNS.items() if kind in (None, _KIND[name])
    )
    return UnknownFormatError(
        f"{reference} is in no known {f'{kind} ' if kind else ''}format: its first row has the columns {there}. Known "
        f"are {known}; a text must be written with the named template. Other names are mapped with data.columns."
    )
