"""Fields of TRL's configuration classes as keys of a recipe.

`library_fields.json` holds the types and defaults of all fields, so that a recipe is checked in milliseconds and TRL is
not imported. `docs/reference/trl_fields.py` writes the file, and a test holds that it is current.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union

from pydantic import ConfigDict, GetJsonSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from llm_engineering.recipe.block import Block

FILE = Path(__file__).with_suffix(".json")

Schema = dict[str, Any]
_TYPES: dict[str, Any] = {
    "integer": int, "number": float, "boolean": bool, "string": str, "object": dict[str, Any], "null": None,
}  # fmt: skip


@cache
def fields_of(config_class: str) -> dict[str, Schema]:
    """JSON schemas of the fields of a class, e.g. `trl.SFTConfig`, by name, with their defaults."""
    classes: dict[str, dict[str, Schema]] = json.loads(FILE.read_text(encoding="utf-8"))
    return classes[config_class]


def checked(value: Any, schema: Schema) -> Any:
    """Convert a value to the type of a field.

    Raises:
        ValueError: the value does not fit, in pydantic's words.
    """
    try:
        return TypeAdapter(_annotation(schema)).validate_python(value)
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))) from None


def _annotation(schema: Schema) -> Any:
    """The Python type of a field's schema."""
    if "anyOf" in schema:
        return Union[tuple(_annotation(part) for part in schema["anyOf"])]  # noqa: UP007 — the parts are a tuple
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema["type"] == "array":
        return list[_annotation(schema["items"])]  # type: ignore[misc]
    return _TYPES[schema["type"]]


class LibraryBlock(Block):
    """A block that takes, besides its own keys, every field of a library's configuration class.

    Attributes:
        config_class: the class, as `library_fields.json` names it.
        refused: fields that the project sets itself, each with the reason and the place to set it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    config_class: ClassVar[str]
    refused: ClassVar[dict[str, str]]

    @property
    def library_arguments(self) -> dict[str, Any]:
        """The fields that the recipe sets and that are no keys of this block: arguments for the library's class."""
        return dict(self.model_extra or {})

    @classmethod
    def allowed(cls) -> dict[str, Schema]:
        """Schemas of the fields that a recipe may set in this block, besides the block's own keys."""
        known = fields_of(cls.config_class)
        return {n: schema for n, schema in known.items() if n not in cls.refused and n not in cls.model_fields}

    @model_validator(mode="after")
    def _library_fields(self) -> Self:
        problems: dict[str, str] = {}
        allowed = self.allowed()
        assert self.__pydantic_extra__ is not None
        for name, value in self.library_arguments.items():
            if name in allowed:
                try:
                    self.__pydantic_extra__[name] = checked(value, allowed[name])
                except ValueError as error:
                    problems[name] = f"is {value!r}: {error}"
            elif name in self.refused:
                problems[name] = f"cannot be set: {self.refused[name]}"
            else:
                problems[name] = ""
        if problems:
            # `recipe/loading.py` writes one message for each field. An empty problem is an unknown key.
            raise PydanticCustomError("library_fields", "wrong fields", {"problems": problems})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["properties"] |= cls.allowed()
        schema["additionalProperties"] = False
        return schema
