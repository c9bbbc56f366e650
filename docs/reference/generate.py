"""Writes the two reference pages from the code: python docs/reference/generate.py [--check]

`--check` writes nothing and exits with 1 if a page is not current.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llm_engineering.recipe.block import Block, LibraryBlock, Schema
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stages import STAGES

FOLDER = Path(__file__).parent
MARK = "<!-- Written by docs/reference/generate.py. Change the code, then run `make docs`. -->\n\n"
_SYMBOLS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "at least", "max_length": "at most"}


def recipe_page() -> str:
    """Every key of the recipe with its type, default and limits, a section a block."""
    parts = [
        MARK,
        "# Recipe reference\n\n",
        "Every key that a recipe may have. Any other key is refused, with its full path and the nearest valid key.\n",
        "`extends: other.yaml` merges another recipe below this one; `--set a.b=value` overrides one key.\n",
        "A key without a default has to be given.\n\n",
        *_block(Recipe, "", {}),
        "## Fields of every stage\n\n",
        *_field_tables("the fields that TRL's classes share, which TRL documents", *_shared()),
    ]
    return "".join(parts).rstrip() + "\n"


def _block(block: type[BaseModel], prefix: str, described_at: dict[type[BaseModel], str]) -> list[str]:
    """The section of a block, and those of the blocks in it. A block that is described already gets a link."""
    heading = f"## `{prefix.rstrip('.')}`\n\n" if prefix else "## Top level\n\n"
    rows, inner = [], []
    for name, field in block.model_fields.items():
        child = _child(field.annotation)
        if child is not None:
            optional = "" if not _is_optional(field.annotation) else ", may be left out"
            is_new = child not in described_at
            path = described_at.setdefault(child, prefix + name)
            anchor = f"#{re.sub(r'[^a-z0-9_]', '', path.lower())}"
            rows.append(f"| `{name}` | [block{'' if is_new else f' as {path}'}]({anchor}){optional} | | |\n")
            inner += _block(child, f"{prefix}{name}.", described_at) if is_new else []
            continue
        limits = ", ".join(filter(None, map(_limit, field.metadata)))
        rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {limits} |\n")
    # A block of several parts is described by all of them.
    described = [
        part for part in reversed(block.__mro__) if issubclass(part, Block) and part not in (Block, LibraryBlock)
    ]
    text = "\n\n".join(inspect.cleandoc(part.__doc__) for part in described if part.__doc__)
    table = "| Key | Type | Default | Limits |\n| --- | --- | --- | --- |\n" + "".join(rows)
    return [heading, text + "\n\n", table + "\n", *_library_fields(block), *inner]


def _library_fields(block: type[BaseModel]) -> list[str]:
    """The fields of the library that a block takes besides its own keys, and those that it refuses."""
    if not issubclass(block, LibraryBlock):
        return []
    allowed, refused = _fields(block)
    library = block.config_class.partition(".")[0].upper()
    title = f"the fields of {block.config_class}, which {library} documents"
    if block not in [stage.block for stage in STAGES.values()]:
        return _field_tables(title, allowed, refused)
    shared, refused_everywhere = _shared()
    return [
        "The [fields of every stage](#fields-of-every-stage) can be set too.\n\n",
        *_field_tables(
            title,
            {name: field for name, field in allowed.items() if name not in shared},
            {name: reason for name, reason in refused.items() if name not in refused_everywhere},
        ),
    ]


def _fields(block: type[LibraryBlock]) -> tuple[dict[str, Schema], dict[str, str]]:
    """The fields of the library that a block takes, and those and their values that it refuses, with the reasons."""
    values = {
        f"{name}: {value}": why for name, reasons in block.refused_values.items() for value, why in reasons.items()
    }
    return block.allowed(), block.refused | values


def _shared() -> tuple[dict[str, Schema], dict[str, str]]:
    """The fields that all stages take, and those that all refuse for the same reason."""
    (allowed, refused), *others = (_fields(stage.block) for stage in STAGES.values())
    return (
        {name: field for name, field in allowed.items() if all(other.get(name) == field for other, _ in others)},
        {name: reason for name, reason in refused.items() if all(other.get(name) == reason for _, other in others)},
    )


def _field_tables(title: str, allowed: dict[str, Schema], refused: dict[str, str]) -> list[str]:
    more = "".join(
        f"| `{name}` | {_schema_type(field)} | `{json.dumps(field.get('default'))}` |\n"
        for name, field in allowed.items()
    )
    reasons = "".join(f"| `{name}` | {reason} |\n" for name, reason in sorted(refused.items()))
    return [
        f'??? note "More keys: {title}"\n\n',
        _indented(f"| Key | Type | Default |\n| --- | --- | --- |\n{more}"),
        '??? note "Fields that a recipe cannot set"\n\n',
        _indented(f"| Key | Reason |\n| --- | --- |\n{reasons}"),
    ]


def _schema_type(schema: Schema) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_schema_type, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "pattern" in schema:
        return f"text that matches `{schema['pattern']}`"
    if "properties" in schema:
        return "the keys " + ", ".join(f"`{name}`" for name in schema["properties"])
    if schema.get("additionalProperties"):
        return f"keys with {_schema_type(schema['additionalProperties'])}"
    if schema["type"] == "array":
        return f"list of {_schema_type(schema['items'])}"
    names = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`", "object": "keys with values"}
    kind: str = schema["type"]
    return names.get(kind, kind)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines()) + "\n"


def _child(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _is_optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _type(annotation: Any) -> str:
    """A type as a person writes it, e.g. `` `auto` or `off` `` and `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} to {_type(arguments[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "null"}
    return names.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _limit(constraint: Any) -> str:
    for name, symbol in _SYMBOLS.items():
        value = getattr(constraint, name, None)
        if value is not None:
            return f"{symbol} {value}"
    pattern = getattr(constraint, "pattern", None)
    return f"matches `{pattern}`".replace("|", "\\|") if pattern else ""


def schema() -> str:
    """The JSON schema of a recipe, with which editors complete keys and mark wrong ones."""
    found = Recipe.model_json_schema()
    found["properties"]["extends"] = {"type": "string", "description": "Another recipe, relative to this one."}
    # A recipe that extends another one leaves keys out.
    found.pop("required", None)
    for block in found["$defs"].values():
        block.pop("required", None)
    return _lines(found) + "\n"


def _lines(value: Any, levels: int = 4) -> str:
    """JSON with a line for each key of the first levels. The keys of a block are on the fourth."""
    if not levels or not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    pad = " " * (5 - levels)
    return "{\n" + ",\n".join(f'{pad}"{key}": {_lines(inner, levels - 1)}' for key, inner in value.items()) + "}"


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` describes them, and the Make target that calls it."""
    from tools.cli import COMMANDS, PROGRAM, command_line

    parts = [MARK, "# Command reference\n\n", _COMMANDS_LEAD, _targets()]
    for panel, entries in COMMANDS.items():
        parts.append(f"## {panel}\n\n")
        for entry in entries:
            command: Any = command_line()
            for word in entry.name.split():
                command = command.commands[word]
            loaded = command.load()
            parts += [f"### `{PROGRAM} {entry.name}`\n\n", f"{_text(loaded)}\n\n", *_parameters(loaded)]
    return "".join(parts).rstrip() + "\n"


_COMMANDS_LEAD = """`make TARGET` and `llm-engineering COMMAND` are the same commands. `make` builds `.venv` first and takes variables;
`llm-engineering` is in `.venv/bin` and takes options. `make TARGET ARGS="…"` passes options through.
`llm-engineering --install-completion` installs completion for the shell.

## Exit codes

| Code | Means |
| --- | --- |
| 0 | Done. |
| 1 | The work failed. |
| 2 | The request was wrong, and nothing ran, or the data is not fit, and nothing was trained with it. |
| 130 | Interrupted. Finished work is kept. |

`make` itself ends with 2 if a command fails in any way. A script that needs the exit code calls `llm-engineering`.

"""


def _targets() -> str:
    from tools.make import TARGETS

    rows = []
    for name, target in TARGETS.items():
        variables = [*([target.argument] if target.argument else []), *target.options, "ARGS"]
        rows.append(f"| `make {name}` | `{target.command}` | {', '.join(f'`{v}`' for v in variables)} |\n")
    return "## Make targets\n\n| Target | Command | Variables |\n| --- | --- | --- |\n" + "".join(rows) + "\n"


def _text(command: Any) -> str:
    return inspect.cleandoc(command.help or "").replace("\b\n", "")


def _parameters(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "install_completion", "show_completion") or getattr(parameter, "hidden", False):
            continue
        is_option = parameter.param_type_name == "option"
        names = (
            ", ".join(f"`{name}`" for name in parameter.opts)
            if is_option
            else f"`{parameter.metavar or parameter.name.upper()}`"
        )
        text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
        rows.append(f"| {names} | {text} |\n")
    return ["| Argument or option | Meaning |\n| --- | --- |\n", *rows, "\n"] if rows else []


def main() -> int:
    """Write the pages, or check them."""
    stale = []
    pages = {"recipe.md": recipe_page(), "commands.md": commands_page(), "../../configs/recipe.schema.json": schema()}
    for name, text in pages.items():
        file = FOLDER / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                file.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"Not current: {', '.join(stale)}. Run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
