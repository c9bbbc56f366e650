"""The commands `models lineage`, which shows a model version's origin, and `models verify`, which checks its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from rich.table import Table

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.progress import counted
from llm_engineering.recipe.data_blocks import UNFIT
from llm_engineering.recipe.loading import load_recipe, stored_recipe
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.reward_blocks import RewardedConfig
from llm_engineering.recipe.stages import STAGES
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, VersionNumber, prepare_zenml
from tools.terminal import console, titled_table

# The artifacts from which the lineage is followed back. All other artifacts of the version are among their origins.
ENDS = (
    "promotion_decision",
    "evaluation_page",
    "evaluation_report",
    *(f"{stage}_adapter" for stage in reversed(STAGES)),
)

# Metadata of an adapter: where and with how many operations it was trained.
TRAINING_FACTS = ("environment", "flops", "steps")

# Metadata of the artifacts with rows of people.
PEOPLE_FACTS = ("rows", "by", "first", "last", "about")


class Finding(BaseModel):
    """A file that differs from its record; `unknown` if there is no record, or if it cannot be compared."""

    where: str
    file: str
    what: Literal["changed", "lost", "added", "unknown"]
    detail: str = ""


def lineage(
    version: VersionNumber, config: Config = DEFAULT_RECIPE, overrides: Overrides = None, as_json: Json = False
) -> int:
    """Show where a model version comes from, with hashes.

    The lineage starts at the gate's decision, and goes back through adapters and datasets to the files that were read.

    Example: `llm-engineering models lineage 3`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from tools.model_versions.versions import find_version

    found = lineage_of(recipe.name, find_version(recipe.name, version))
    if as_json:
        print(json.dumps(found))
        return 0
    shown = console(width=240)
    facts = titled_table(f"{recipe.name} version {found['version']}", "What", "Value")
    for name in ("stage", "run", "recipe_hash", "code_version", "base_model", "base_revision"):
        facts.add_row(name.replace("_", " "), str(found[name] or "none"))
    for stage, why in found[UNFIT].items():
        facts.add_row(f"unfit data of {stage}", why)
    for stage, trained in found["training"].items():
        facts.add_row(f"{stage} trained with", describe(trained["environment"]))
    shown.print(facts)
    artifacts = titled_table("Artifacts", "Artifact", "Made by", "Code", "From", "Id", "SHA-256 of SHA256SUMS")
    for artifact in found["artifacts"]:
        artifacts.add_row(
            f"{artifact['name']} v{artifact['version']}",
            artifact["step"],
            artifact["code"],
            "\n".join(artifact["from"]),
            artifact["id"],
            artifact["sha256"] or "not recorded",
        )
    shown.print(artifacts)
    sources = titled_table("Sources", "Read by", "File", "SHA-256")
    for artifact, files in found["sources"].items():
        for file, value in files.items():
            sources.add_row(artifact, file, value)
    shown.print(sources)
    if found["people"]:
        people = titled_table("What people said", "Artifact", "By, rows of each", "When", "About")
        for artifact, said in found["people"].items():
            by, about = (", ".join(f"{name} ({count})" for name, count in said[key].items()) for key in ("by", "about"))
            people.add_row(artifact, by, f"{said['first'][:16]} to {said['last'][:16]}".replace("T", " "), about)
        shown.print(people)
    if found["changes"]:
        changes = titled_table("Changes of stage", "When (UTC)", "What", "By", "Note")
        for change in found["changes"]:
            changes.add_row(change["at"][:16].replace("T", " "), change["action"], change["by"], change["note"])
        shown.print(changes)
    return 0


def verify(
    version: VersionNumber, config: Config = DEFAULT_RECIPE, overrides: Overrides = None, as_json: Json = False
) -> int:
    """Check the files of a model version against the recorded hashes.

    The command checks the version's artifacts, the files that they were read from, and the base model. It lists files
    that were changed, lost or added. The exit code is 1 if a file differs or cannot be checked.

    Example: `llm-engineering models verify 3`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from pipelines.repeats import linked_artifacts
    from tools.model_versions.versions import find_version, with_origins

    found = find_version(recipe.name, version)
    artifacts = list(with_origins(linked_artifacts(found)))
    findings = check_version(found, artifacts)
    if as_json:
        listed = [finding.model_dump() for finding in findings]
        print(json.dumps({"model": recipe.name, "version": found.number, "checked": len(artifacts), "found": listed}))
        return 1 if findings else 0
    if not findings:
        print(f"{recipe.name} version {found.number}: {len(artifacts)} artifacts, their sources and the base model "
              "are unchanged.")  # fmt: skip
        return 0
    table = Table("Where", "File", "What", "Detail", title=f"{recipe.name} version {found.number}: differences")
    for finding in findings:
        table.add_row(finding.where, finding.file, finding.what, finding.detail)
    console(width=200).print(table)
    return 1


def check_version(version: Any, artifacts: Sequence[Any]) -> list[Finding]:
    """Compare artifacts of a version, the files that they were read from, and the base model with the recorded hashes."""
    findings = [finding for artifact in artifacts for finding in changed_files(artifact)]
    damaged = {finding.where for finding in findings}
    for artifact in artifacts:
        if name_of(artifact) not in damaged:
            findings += _sources(artifact)
    return [*findings, *_base_model(version)]


def lineage_of(model: str, version: Any) -> dict[str, Any]:
    """A model version's artifacts with their origins, back to the documents, and their hashes.

    Raises:
        RequestError: the version has no model.
    """
    from pipelines.registry import history
    from tools.model_versions.versions import (
        ADAPTER,
        newest_artifacts,
        producer,
        sources_of,
        trained_adapter,
        with_origins,
    )

    adapter = trained_adapter(version)
    own = newest_artifacts(version)
    chain = list(with_origins([own[name] for name in ENDS if name in own]))
    facts = version.run_metadata
    artifacts, sources, people, training = [], {}, {}, {}
    for artifact in chain:
        step = producer(artifact)
        given = [g for versions in step.inputs.values() for g in versions] if step is not None else []
        artifacts.append(
            {
                "name": artifact.artifact.name,
                "version": artifact.version,
                "id": str(artifact.id),
                "uri": artifact.uri,
                "sha256": artifact.content_hash,
                "step": step.name if step is not None else "",
                "code": step.config.environment.get("CODE_VERSION", "") if step is not None else "",
                "from": [f"{g.artifact.name} v{g.version}" for g in given],
            }
        )
        if artifact.artifact.name.startswith("human_"):
            said = artifact.run_metadata
            people[f"{artifact.artifact.name} v{artifact.version}"] = {name: said[name] for name in PEOPLE_FACTS}
        if artifact.artifact.name.endswith(ADAPTER) and step is not None:
            made = artifact.run_metadata
            training[artifact.artifact.name.removesuffix(ADAPTER)] = {
                "report": step.outputs["training_report"][0].uri,
                **{name: made[name] for name in TRAINING_FACTS},
            }
        if recorded := sources_of(artifact):
            sources[f"{artifact.artifact.name} v{artifact.version}"] = recorded
    return {
        "model": model,
        "version": version.number,
        "id": str(version.id),
        "stage": version.stage,
        "run": next((artifact.run.name for artifact in chain[:1]), None),
        "recipe_hash": facts.get("recipe_hash"),
        "code_version": facts.get("code_version"),
        UNFIT: facts.get(UNFIT, {}),
        "base_model": adapter.base.name_or_path,
        "base_revision": adapter.base.revision,
        "artifacts": artifacts,
        "sources": sources,
        "people": people,
        "training": training,
        "changes": [change.model_dump(mode="json") for change in history(model) if change.version == version.number],
    }


def describe(environment: Mapping[str, Any]) -> str:
    """Where a stage was trained, as one line."""
    machine = environment["gpu"] or environment["processor"]
    torch = environment["packages"]["torch"]
    return f"{machine}, {counted(environment['threads'], 'thread')}, Python {environment['python']}, torch {torch}"


def differing(where: str, then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Finding]:
    """The differences between the recorded and the current hashes, which are given by file name."""
    for file in sorted(then.keys() | now.keys()):
        if file not in now:
            yield Finding(where=where, file=file, what="lost")
        elif file not in then:
            yield Finding(where=where, file=file, what="added")
        elif then[file] != now[file]:
            yield Finding(where=where, file=file, what="changed")


def changed_files(artifact: Any) -> Iterator[Finding]:
    """Compare the files of an artifact with its manifest, and the manifest with its hash in ZenML's database."""
    from steps.materializers import MANIFEST, file_hashes
    from tools.model_versions.versions import store_of

    where, store = name_of(artifact), store_of(artifact)
    if artifact.content_hash is None:
        yield Finding(where=where, file="", what="unknown", detail="its hashes were never recorded")
        return
    if not store.exists(artifact.uri):
        yield Finding(where=where, file=artifact.uri, what="lost", detail="the whole artifact")
        return
    path = os.path.join(artifact.uri, MANIFEST)
    now = file_hashes(artifact.uri, store)
    if not store.exists(path):
        yield Finding(
            where=where, file=MANIFEST, what="lost", detail="without it, changed files of this artifact cannot be found"
        )
        return
    with store.open(path, "rb") as file:
        manifest: bytes = file.read()
    if hashlib.sha256(manifest).hexdigest() != artifact.content_hash:
        yield Finding(where=where, file=MANIFEST, what="changed", detail="the hashes in it cannot be trusted")
    lines = manifest.decode("utf-8", "replace").splitlines()
    then = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    yield from differing(where, then, now)


def _present(recipe: Recipe, artifact: str) -> dict[str, str]:
    """Present hashes of the files that an artifact was read from, or of the rewards that an adapter was trained on."""
    from llm_engineering.documents.fingerprints import recipe_fingerprints
    from llm_engineering.training.rewards import reward_files
    from tools.model_versions.versions import ADAPTER

    if not artifact.endswith(ADAPTER):
        return recipe_fingerprints(recipe, artifact)
    block = recipe.block(artifact.removesuffix(ADAPTER))
    return reward_files(block) if isinstance(block, RewardedConfig) else {}


def _sources(artifact: Any) -> Iterator[Finding]:
    """Compare the user's files that an artifact was read from, or evaluated with, with their recorded hashes."""
    from llm_engineering.data.reading.sources import dataset_hash
    from llm_engineering.evaluation.measures.exam import exam_hash
    from llm_engineering.evaluation.requirements import files_hash
    from tools.model_versions.versions import sources_of

    name = artifact.artifact.name
    then = sources_of(artifact)
    evaluation = artifact.run_metadata.get("evaluation_hash")
    checks, exam = (artifact.run_metadata.get(name) for name in ("files_hash", "exam_hash"))
    if not then and evaluation is None and checks is None and exam is None:
        return
    where = f"sources of {name_of(artifact)}"
    try:
        recipe = stored_recipe(
            artifact.run.config.parameters or {},
            f"Run {artifact.run.name}",
            "Verify this version with the commit that `make lineage` shows.",
        )
    except RequestError as error:
        yield Finding(where=where, file="", what="unknown", detail=str(error))
        return
    try:
        if then:
            yield from differing(where, then, _present(recipe, name))
        elif evaluation is not None:
            if "-".join(map(dataset_hash, recipe.data.decontaminate_against)) != evaluation:
                yield Finding(where=where, file=", ".join(recipe.data.decontaminate_against), what="changed")
        else:
            if files_hash(recipe.evaluation) != checks:
                tasks = recipe.evaluation.lm_eval
                named = [
                    recipe.evaluation.checks,
                    recipe.evaluation.canaries,
                    tasks.include_path if tasks is not None else None,
                ]
                yield Finding(where=where, file=", ".join(filter(None, named)), what="changed")
            # A generated exam is an artifact of its own, and its hash stands before that of the other file.
            now = exam_hash(recipe.exam) if recipe.exam is not None else None
            generated = recipe.exam is not None and recipe.exam.is_generated
            if now is not None and not (str(exam).endswith(now) if generated else exam == now):
                assert recipe.exam is not None
                named = [None if generated else recipe.exam.path, recipe.exam.control]
                yield Finding(where=where, file=", ".join(filter(None, named)), what="changed")
    except (RequestError, WorkError) as error:
        yield Finding(where=where, file="", what="lost", detail=str(error))


def _base_model(version: Any) -> Iterator[Finding]:
    """Compare the base model with its recorded revision.

    Only a folder or the embedded model can change. A model of the hub is pinned to a commit.
    """
    from llm_engineering.models.revision import pin_revision
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


def name_of(artifact: Any) -> str:
    """Name and version of an artifact, as `sft_adapter v3`."""
    return f"{artifact.artifact.name} v{artifact.version}"
