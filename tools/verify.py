"""Compares a model version's files with what was recorded: python -m tools.verify VERSION [--json]"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL, ModelConfig
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging


class Finding(BaseModel):
    """Something that is not as it was recorded; `unknown` where nothing was recorded or it cannot be looked up."""

    where: str
    file: str
    what: Literal["changed", "lost", "added", "unknown"]
    detail: str = ""


def main() -> int:
    """Verify; returns the exit code, 1 if anything differs or cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description="Verify the files of a model version.")
    parser.add_argument("version", help="its number, as `make models` shows it")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _verify(arguments), arguments.debug)


def _verify(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    prepare_zenml()
    from tools.versions import find_version, linked_artifacts, with_origins

    version = find_version(recipe.name, arguments.version)
    artifacts = list(with_origins(linked_artifacts(version)))
    findings = [finding for artifact in artifacts for finding in _artifact(artifact)]
    damaged = {finding.where for finding in findings}
    for artifact in artifacts:
        if _name(artifact) not in damaged:
            findings += _sources(artifact)
    findings += _base_model(version)
    if arguments.json:
        found = [finding.model_dump() for finding in findings]
        print(json.dumps({"model": recipe.name, "version": version.number, "checked": len(artifacts), "found": found}))
        return 1 if findings else 0
    if not findings:
        print(f"{recipe.name} version {version.number}: {len(artifacts)} artifacts, their sources and the base model "
              "are as they were recorded.")  # fmt: skip
        return 0
    table = Table("Where", "File", "What", "Detail", title=f"{recipe.name} version {version.number}: not as recorded")
    for finding in findings:
        table.add_row(finding.where, finding.file, finding.what, finding.detail)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    return 1


def differing(where: str, then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Finding]:
    """What differs between two sets of hashes by file."""
    for file in sorted(then.keys() | now.keys()):
        if file not in now:
            yield Finding(where=where, file=file, what="lost")
        elif file not in then:
            yield Finding(where=where, file=file, what="added")
        elif then[file] != now[file]:
            yield Finding(where=where, file=file, what="changed")


def _artifact(artifact: Any) -> Iterator[Finding]:
    """The files of an artifact against the manifest, and the manifest against its hash in ZenML's store."""
    from zenml.client import Client

    from steps.materializers import MANIFEST, file_hashes

    where, store = _name(artifact), Client().active_stack.artifact_store
    if artifact.content_hash is None:
        yield Finding(where=where, file="", what="unknown", detail="no hashes were recorded when it was made")
        return
    if not store.exists(artifact.uri):
        yield Finding(where=where, file=artifact.uri, what="lost", detail="the whole artifact")
        return
    path = os.path.join(artifact.uri, MANIFEST)
    now = file_hashes(artifact.uri, store)
    if not store.exists(path):
        yield Finding(where=where, file=MANIFEST, what="lost", detail="its files cannot be told from others")
        return
    with store.open(path, "rb") as file:
        manifest: bytes = file.read()
    if hashlib.sha256(manifest).hexdigest() != artifact.content_hash:
        yield Finding(where=where, file=MANIFEST, what="changed", detail="what it says of the files is not reliable")
    lines = manifest.decode("utf-8", "replace").splitlines()
    then = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    yield from differing(where, then, now)


def _sources(artifact: Any) -> Iterator[Finding]:
    """The user's files that an artifact was read from, or measured with."""
    from llm_engineering.data.sources import dataset_hash
    from llm_engineering.documents.fingerprints import recipe_fingerprints
    from llm_engineering.evaluation.requirements import files_hash
    from tools.versions import sources_of

    name = artifact.artifact.name
    then = sources_of(artifact)
    evaluation = artifact.run_metadata.get("evaluation_hash")
    checks = artifact.run_metadata.get("files_hash")
    if not then and evaluation is None and checks is None:
        return
    where = f"sources of {_name(artifact)}"
    try:
        recipe = Recipe.model_validate((artifact.run.config.parameters or {})["recipe"])
    except (KeyError, ValidationError):
        yield Finding(where=where, file="", what="unknown", detail="made with another version of the recipe's schema")
        return
    try:
        if then:
            yield from differing(where, then, recipe_fingerprints(recipe, name))
        elif evaluation is not None:
            if "-".join(map(dataset_hash, recipe.data.decontaminate_against)) != evaluation:
                yield Finding(where=where, file=", ".join(recipe.data.decontaminate_against), what="changed")
        elif files_hash(recipe.evaluation) != checks:
            tasks = recipe.evaluation.lm_eval
            named = [recipe.evaluation.checks, tasks.include_path if tasks is not None else None]
            yield Finding(where=where, file=", ".join(filter(None, named)), what="changed")
    except (RequestError, WorkError) as error:
        yield Finding(where=where, file="", what="lost", detail=str(error))


def _base_model(version: Any) -> Iterator[Finding]:
    """The base model's folder or package; a commit of the hub names its content."""
    from llm_engineering.models.loading import pin_revision
    from pipelines.registry import adapter_of

    adapter = adapter_of(version)
    if adapter is None:
        return
    name, then = adapter.base.name_or_path, str(adapter.base.revision)
    if name != EMBEDDED_MODEL and not then.startswith("folder-"):
        return
    try:
        now = pin_revision(ModelConfig(name_or_path=name)).revision
    except RequestError as error:
        yield Finding(where="base model", file=name, what="lost", detail=str(error))
        return
    if now != then:
        yield Finding(where="base model", file=name, what="changed", detail=f"{then}, now {now}")


def _name(artifact: Any) -> str:
    return f"{artifact.artifact.name} v{artifact.version}"


if __name__ == "__main__":
    sys.exit(main())
