"""Reads a recipe file: merges `extends` and `--set`, validates, and reports errors with the file and the key."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.block import LibraryBlock
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, file_among
from llm_engineering.recipe.recipe import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and validate a recipe.

    Args:
        path: the YAML file. Its key `extends` may name another recipe, by a path relative to this file.
        overrides: `a.b=value` strings, applied last; the value is read as YAML.

    Raises:
        RequestError: with the file (or `--set`), the key's full path, what is wrong and the nearest valid key.
    """
    origin: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for source, layer in _layers(Path(path), overrides):
        _merge(merged, layer, origin, source, "")
    try:
        recipe: Recipe = Recipe.model_validate(merged)
        return recipe
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(problem, origin, str(path))]
        raise RequestError("\n".join(problems)) from None


def stored_recipe(stored: Mapping[str, Any], what: str, remedy: str) -> Recipe:
    """The recipe in the parameters of a run or the metadata of a version. Only values that were set are stored.

    Args:
        what: begins the error's sentence, e.g. `Version 3`; `remedy` is the sentence after it.

    Raises:
        RequestError: there is no recipe, or its schema is another one.
    """
    try:
        recipe: Recipe = Recipe.model_validate(stored["recipe"])
        return recipe
    except (KeyError, ValidationError) as error:
        raise RequestError(
            f"{what} has no recorded recipe, or one of another version of the recipe's schema. {remedy}"
        ) from error


def check_name(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Refuse other documents or datasets under the name of a recipe for an embedded source.

    The model would be registered as another version of that recipe's model, and be compared with it.

    Args:
        path, overrides: as `load_recipe` gets them.

    Raises:
        RequestError: a layer changes the source of the rows, and neither it nor a later layer sets `name`.
    """
    origin: dict[str, str] = {}
    merged: dict[str, Any] = {}
    named: dict[str, str | None] = {}
    for source, layer in _layers(Path(path), overrides):
        _merge(merged, layer, origin, source, "")
        # The keys of --set are one layer, in any order.
        if "name" in layer or origin.get("name") == source:
            named = _sources(merged)
    sources = _sources(merged)
    changed = next((key for key, value in sources.items() if value is not None and value != named[key]), None)
    embedded = str(named["documents.path"])
    if changed is None or not embedded.startswith("embedded:") or named["data.instructions"] is not None:
        return
    value, place = str(sources[changed]), origin[changed]
    own = name_for(value)
    remedy = f"Add --set name={own}" if place == "--set" else f"Write `name: {own}` in {place}"
    raise RequestError(
        f"{place}: `{changed}` is {value}, and `name` is still {merged['name']}, which {origin['name']} gives to the model of "
        f"{named[changed] or embedded}. The new model would count as another version of that model. {remedy}, or another name."
    )


def name_for(source: str) -> str:
    """A name for the model of a folder, a file or a dataset: the last part of its path."""
    place = source.partition("#")[0].removeprefix("embedded:")
    last = PurePath(place).stem or Path(place).resolve().name
    name = re.sub(r"[^a-zA-Z0-9._]+", "-", re.sub(r"\.{2,}", ".", last)).removesuffix(".git")
    return name[:96].strip("._-") or "my-model"


def _sources(merged: dict[str, Any]) -> dict[str, str | None]:
    """Where the rows come from, by the key of the recipe."""
    documents, data = merged.get("documents") or {}, merged.get("data") or {}
    return {
        "documents.path": documents.get("path", EMBEDDED_DOCUMENTS),
        "data.instructions": file_among(data.get("instructions")),
        "data.preferences": file_among(data.get("preferences")),
        "data.prompts": file_among(data.get("prompts")),
        "data.labelled": file_among(data.get("labelled")),
    }


def recipe_hash(blocks: BaseModel | dict[str, Any]) -> str:
    """Hash (twelve hex digits) of all values of a recipe, or of some of its blocks."""
    data = blocks.model_dump(mode="json") if isinstance(blocks, BaseModel) else blocks
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:12]


def differences(then: Any, now: Any, prefix: str = "") -> list[str]:
    """The full paths of the keys that differ between two dumped recipes, or between parts of them."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [d for key in keys for d in differences(then.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if then == now else [prefix.rstrip(".")]


def value_at(dumped: Any, key: str) -> Any:
    """The value at the full path of a key in a dumped recipe; None if there is none."""
    for part in key.split("."):
        dumped = dumped.get(part) if isinstance(dumped, dict) else None
    return dumped


def _layers(path: Path, overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a recipe, the extended one first, and the overrides, each with its name in messages."""
    yield from _files(path, ())
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise RequestError(
                f"--set {override!r} is not of the form key.path=value, e.g. --set sft.learning_rate=1e-4"
            )
        try:
            layer: Any = _from_yaml(text)
        except YAMLError as error:
            raise RequestError(f"--set {override!r}: the value is not valid YAML ({_first_line(error)}).") from error
        for part in reversed(key.strip().split(".")):
            layer = {part: layer}
        yield "--set", layer


def _files(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.resolve() in seen:
        raise RequestError(
            f"{path}: `extends` goes in a circle ({' → '.join(p.name for p in (*seen, path))}). Remove one of them."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RequestError(f"There is no recipe file {path}. The recipes of the project are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The recipe {path} cannot be read: {error}.") from error
    try:
        data = _from_yaml(text)
    except YAMLError as error:
        raise RequestError(f"{path} is not valid YAML: {_first_line(error)}.") from error
    if not isinstance(data, dict):
        raise RequestError(f"{path} is not a recipe: write keys such as `name:` and `model:` at the top level.")
    parent = data.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise RequestError(f"{path}: `extends` must be the path of one recipe, not {parent!r}.")
        yield from _files(path.parent / parent, (*seen, path.resolve()))
    yield str(path), data


def _merge(into: dict[str, Any], layer: dict[str, Any], origin: dict[str, str], source: str, prefix: str) -> None:
    for key, value in layer.items():
        full = f"{prefix}{key}"
        origin[full] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin, source, f"{full}.")
        else:
            into[key] = value
            if isinstance(value, dict):
                into[key] = {}
                _merge(into[key], value, origin, source, f"{full}.")


def _from_yaml(text: str) -> Any:
    # YAML 1.2: `1e-4` is a number, `off` and `no` are text, and a key given twice is an error.
    return YAML(typ="safe", pure=True).load(text)


def _first_line(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    # ruamel reports a duplicate key before it has read the values, and shows a block as `{}`. So the values are cut off.
    return where + problem.partition(" with value ")[0]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every valid key with its full path."""
    if issubclass(model, LibraryBlock):
        yield from (prefix + name for name in model.allowed())
    for name, field in model.model_fields.items():
        yield prefix + name
        # The type may be a block or an optional block.
        for annotation in (field.annotation, *get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from _keys(annotation, f"{prefix}{name}.")


def _nearest(key: str) -> str:
    """A sentence with the valid key that the user most likely meant, or with the valid keys of the block."""
    valid = list(_keys(Recipe))
    name = key.rpartition(".")[2]
    same_name = [candidate for candidate in valid if candidate.rpartition(".")[2] == name]
    siblings = [c for c in valid if c.rpartition(".")[0] == key.rpartition(".")[0]]
    # Paths in one block begin alike, so only the last parts are compared: first in the same block, then in all blocks.
    for candidates, cutoff in ((siblings, 0.6), (valid, 0.65)):
        by_name = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        near = difflib.get_close_matches(name, by_name, n=1, cutoff=cutoff)
        if near:
            return f"Did you mean `{by_name[near[0]]}`?"
        if same_name:
            return f"Did you mean {' or '.join(f'`{c}`' for c in same_name[:3])}?"
    return f"Valid keys there: {', '.join(c.rpartition('.')[2] for c in siblings) or ', '.join(Recipe.model_fields)}."


def _explain(problem: Any, origin: dict[str, str], path: str) -> list[str]:
    """Explain a problem, with one line for each wrong key."""
    if problem["type"] != "library_fields":
        return [_explain_key(problem, origin, path)]
    lines = []
    for name, wrong in problem["ctx"]["problems"].items():
        key = ".".join([*map(str, problem["loc"]), name])
        unknown = f"{origin.get(key, path)}: unknown key `{key}`. {_nearest(key)}"
        lines.append(f"{origin.get(key, path)}: `{key}` {wrong}." if wrong else unknown)
    return lines


def _explain_key(problem: Any, origin: dict[str, str], path: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    source = next((origin[k] for k in (key, key.rpartition(".")[0]) if k in origin), path)
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown key `{key}`. {_nearest(key)}"
    if problem["type"] == "missing":
        return f"{source}: the key `{key}` is missing. configs/local.yaml shows a complete recipe."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{source}: {f'`{key}`: ' if key else ''}{message}."
    return f"{source}: `{key}` is {problem['input']!r}: {message[0].lower()}{message[1:]}."
