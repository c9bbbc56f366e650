"""Writes the types and defaults of TRL's and PEFT's configuration classes to `recipe/library_fields.json`:

    python docs/reference/library_fields.py [--check]

`--check` writes nothing and exits with 1 if the file is not that of the installed libraries.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import peft
import trl

from llm_engineering.recipe.block import FILE, Schema

CLASSES: dict[str, type[Any]] = {
    "trl.SFTConfig": trl.SFTConfig,
    "trl.DPOConfig": trl.DPOConfig,
    "trl.RewardConfig": trl.RewardConfig,
    "trl.GRPOConfig": trl.GRPOConfig,
    "trl.RLOOConfig": trl.RLOOConfig,
    "trl.KTOConfig": trl.KTOConfig,
    "peft.LoraConfig": peft.LoraConfig,
}
_NAMES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
_LISTS = [list[int], list[str]]


def library_fields() -> dict[str, dict[str, Schema]]:
    """The JSON schema of each field, with its default: of `trl` those that all its classes share, of a class its others."""
    found = {name: _fields(config_class) for name, config_class in CLASSES.items()}
    first, *others = (fields for name, fields in found.items() if name.startswith("trl."))
    shared = {name: schema for name, schema in first.items() if all(other.get(name) == schema for other in others)}
    own = {
        name: {f: schema for f, schema in fields.items() if shared.get(f) != schema}
        if name.startswith("trl.")
        else fields
        for name, fields in found.items()
    }
    return {"trl": shared, **own}


def as_text() -> str:
    """The content of `library_fields.json`, with one line for each field."""
    parts = []
    for name, fields in library_fields().items():
        lines = ",\n".join(f'  "{field}": {json.dumps(schema, ensure_ascii=False)}' for field, schema in fields.items())
        parts.append(f'"{name}": {{\n{lines}\n}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _fields(config_class: type[Any]) -> dict[str, Schema]:
    hints = get_type_hints(config_class)
    found: dict[str, Schema] = {}
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name):
        schema = _schema(hints[field.name])
        default = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(default, enum.Enum):
            default = default.value
        # A recipe cannot contain objects of other classes.
        if default is None or isinstance(default, bool | int | float | str | list | dict):
            schema["default"] = default
        found[field.name] = schema
    return found


def _schema(annotation: Any) -> Schema:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        parts = [_schema(part) for part in arguments]
        parts = [inner for part in parts for inner in part.get("anyOf", [part])]
        # A class with known fields is more exact than any mapping.
        if any("properties" in part for part in parts):
            parts = [part for part in parts if part != {"type": "object"}]
        # If a field allows an enumeration of strings or any string, keep only the enumeration's values: transformers
        # accepts these values as strings.
        if any(isinstance(part.get("enum", [None])[0], str) for part in parts):
            parts = [part for part in parts if part != {"type": "string"}]
        unique = [part for place, part in enumerate(parts) if part not in parts[:place]]
        return unique[0] if len(unique) == 1 else {"anyOf": unique}
    if origin is Literal:
        # PEFT writes a family of values as one value, e.g. `pissa_niter_[number of iters]`.
        families = [value for value in arguments if "[number of " in str(value)]
        if families:
            values: list[Schema] = [{"enum": [value for value in arguments if value not in families]}]
            return {"anyOf": values + [{"type": "string", "pattern": _pattern(family)} for family in families]}
        return {"enum": list(arguments)}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(arguments[0])}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"enum": [member.value for member in annotation]}
    if annotation in _NAMES:
        return {"type": _NAMES[annotation]}
    if origin is dict and arguments[1] in (*_NAMES, *_LISTS):
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    # PEFT's classes are given as a mapping of their fields.
    if dataclasses.is_dataclass(annotation) and annotation.__module__.startswith("peft."):
        return {"type": "object", "properties": _fields(annotation), "additionalProperties": False}  # type: ignore[arg-type]
    # The rest are dicts, and library classes whose mapping the library checks itself.
    return {"type": "object"}


def _pattern(family: str) -> str:
    name, _, rest = family.partition("[")
    return f"^{re.escape(name)}[0-9]+{re.escape(rest.partition(']')[2])}$"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        FILE.write_text(as_text(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != as_text():
        sys.exit(f"{FILE.name} is not current. Run `make docs`.")
