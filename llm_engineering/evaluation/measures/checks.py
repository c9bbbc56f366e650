"""The user's own checks: prompts, and conditions that their answers must meet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llm_engineering.data.rows import Message
from llm_engineering.evaluation.measures.json_lines import read_json_lines

# A single text counts as a list of one.
_Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class Check(BaseModel):
    """One line of the file: a prompt and its conditions. An answer passes if it meets all of them.

    Attributes:
        must_contain: all of these texts must be in the answer; case matters.
        must_not_contain: none of these texts may be in the answer; case matters.
        regex: a pattern that must match somewhere in the answer.
        exact: the whole answer, without the white space around it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    system: str | None = None
    must_contain: _Texts = []
    must_not_contain: _Texts = []
    regex: str | None = None
    exact: str | None = None

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _has_condition(self) -> Self:
        if not (self.must_contain or self.must_not_contain or self.regex is not None or self.exact is not None):
            raise ValueError("it has no condition: add must_contain, must_not_contain, regex or exact")
        return self

    @property
    def messages(self) -> list[Message]:
        """The conversation that the model answers: `system`, if there is one, and `prompt`."""
        system = [Message(role="system", content=self.system)] if self.system is not None else []
        return [*system, Message(role="user", content=self.prompt)]

    def failures(self, answer: str) -> list[str]:
        """The conditions that an answer does not meet, in words; empty if it passes."""
        unmet = [f"lacks {text!r}" for text in self.must_contain if text not in answer]
        unmet += [f"has {text!r}" for text in self.must_not_contain if text in answer]
        if self.regex is not None and not re.search(self.regex, answer):
            unmet.append(f"does not match {self.regex!r}")
        if self.exact is not None and answer.strip() != self.exact.strip():
            unmet.append(f"is not {self.exact!r}")
        return unmet


def read_checks(path: str) -> list[Check]:
    """Read the checks of a JSONL file, without its empty lines.

    Raises:
        RequestError: the file is missing, unreadable or empty, or some of its lines are wrong. The message names them.
    """
    expected = "check", "`prompt` and a condition"
    return [check for _, check in read_json_lines(path, "evaluation.checks", Check, expected)]


def check_report(checks: Sequence[Check], answers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The report's `checks`: how many answers of each model pass, and every answer with its unmet conditions.

    Args:
        answers: the answers of each model by its name, in the order of `checks`.
    """
    rows: list[dict[str, Any]] = [
        {
            "prompt": check.prompt,
            "answers": {
                name: {"text": texts[index], "failures": check.failures(texts[index])}
                for name, texts in answers.items()
            },
        }
        for index, check in enumerate(checks)
    ]
    passed = {name: sum(not row["answers"][name]["failures"] for row in rows) for name in answers}
    return {"prompts": len(checks), "passed": passed, "rows": rows}
