"""The base classes of the recipe's blocks: one with its own keys, and one that also takes the fields of a library's class.

`library_fields.json` holds the types and defaults of all fields, so that a recipe is checked in milliseconds and no
library is imported. `docs/reference/library_fields.py` writes the file, and a test holds that it is current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import TypedDict

FILE = Path(__file__).with_name("library_fields.json")

Schema = dict[str, Any]
_TYPES: dict[str, Any] = {
    "integer": int, "number": float, "boolean": bool, "string": str, "object": dict[str, Any], "null": None,
}  # fmt: skip


class Block(BaseModel):
    """A block of the recipe. It is frozen, so that no step can change what a later step reads."""

    # YAML can write infinity and NaN, but NaN is neither above nor below a bound and would pass the checks.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@cache
def fields_of(config_class: str) -> dict[str, Schema]:
    """JSON schemas of the fields of a class, e.g. `trl.SFTConfig`, by name, with their defaults.

    The file has the fields that all classes of TRL share once, under `trl`.
    """
    classes: dict[str, dict[str, Schema]] = json.loads(FILE.read_text(encoding="utf-8"))
    shared = classes.get(config_class.partition(".")[0], {})
    return dict(sorted((shared | classes[config_class]).items()))


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
    if "pattern" in schema:
        return Annotated[str, StringConstraints(pattern=schema["pattern"])]
    if "properties" in schema:
        fields = {name: _annotation(part) for name, part in schema["properties"].items()}
        return with_config(ConfigDict(extra="forbid"))(TypedDict("Fields", fields, total=False))  # type: ignore[operator]
    if schema.get("additionalProperties"):
        return dict[str, _annotation(schema["additionalProperties"])]  # type: ignore[misc]
    return _TYPES[schema["type"]]


def _without(schema: Schema, values: Iterable[str]) -> Schema:
    """A field's schema without some values of its enumeration."""
    if "anyOf" in schema:
        return schema | {"anyOf": [_without(part, values) for part in schema["anyOf"]]}
    return schema | {"enum": [value for value in schema["enum"] if value not in values]} if "enum" in schema else schema


class LibraryBlock(Block):
    """A block that takes, besides its own keys, every field of a library's configuration class.

    Attributes:
        config_class: the class, as `library_fields.json` names it.
        refused: fields that the project sets itself, each with the reason and the place to set it.
        refused_values: for some fields, the values that the project cannot take, each with the reason.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    config_class: ClassVar[str]
    refused: ClassVar[dict[str, str]]
    refused_values: ClassVar[dict[str, dict[str, str]]] = {}

    @property
    def library_arguments(self) -> dict[str, Any]:
        """The fields that the recipe sets and that are no keys of this block: arguments for the library's class."""
        return dict(self.model_extra or {})

    @classmethod
    def allowed(cls) -> dict[str, Schema]:
        """Schemas of the fields that a recipe may set in this block, besides the block's own keys."""
        return {
            name: _without(schema, cls.refused_values.get(name, {}))
            for name, schema in fields_of(cls.config_class).items()
            if name not in cls.refused and name not in cls.model_fields
        }

    @model_validator(mode="after")
    def _library_fields(self) -> Self:
        problems: dict[str, str] = {}
        allowed = self.allowed()
        assert self.__pydantic_extra__ is not None
        for name, value in self.library_arguments.items():
            refused_values = self.refused_values.get(name, {})
            if isinstance(value, str) and value in refused_values:
                problems[name] = f"cannot be {value}: {refused_values[value]}"
            elif name in allowed:
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
