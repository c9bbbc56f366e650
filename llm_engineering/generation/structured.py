"""Answers as JSON with one text field: the schema, and what is wrong with an answer that does not fit it."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from llm_engineering.generation.client import Answer, Failure
from llm_engineering.generation.store import Reply

REPAIRABLE = ("bad_json", "wrong_schema")
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?\s*```\Z", re.DOTALL)


@cache
def _model(field: str) -> type[BaseModel]:
    return create_model("Written", __config__=ConfigDict(extra="forbid"), **{field: (str, ...)})  # type: ignore[call-overload,no-any-return]


def json_schema(field: str) -> dict[str, Any]:
    """The schema of an object with one text field and nothing else."""
    return {
        "type": "object",
        "properties": {field: {"type": "string"}},
        "required": [field],
        "additionalProperties": False,
    }


def schema_text(field: str) -> str:
    """The schema as prompts show it."""
    return json.dumps(json_schema(field))


def judge(reply: Reply, field: str | None) -> Answer | Failure:
    """What a reply amounts to. Any text has an outcome, none raises.

    Args:
        field: the text field of the JSON that was asked for; None for an answer in plain text.
    """
    text = reply.text.strip()
    if reply.finish == "refused":
        return Failure("refused", "the model or the endpoint's filter refused to answer", text)
    if reply.finish == "length":
        return Failure("truncated_answer", f"cut off after {reply.output_tokens} tokens", text)
    if not text:
        return Failure("empty_answer", "the answer has no text")
    if field is None:
        return Answer(text)
    fenced = _FENCED.match(text)
    try:
        value = getattr(_model(field).model_validate_json(fenced[1] if fenced else text), field)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        reason = "bad_json" if problem["type"] == "json_invalid" else "wrong_schema"
        place = ".".join(map(str, problem["loc"]))
        return Failure(reason, f"{f'{place}: ' if place else ''}{problem['msg']}", text)
    value = value.strip()
    return Answer(value) if value else Failure("empty_answer", f"`{field}` has no text", text)
