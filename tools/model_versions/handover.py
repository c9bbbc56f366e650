"""The commands `models export`, which writes the files of a model, and `models push`, which publishes a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe, stored_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stages import STAGES
from tools.cli import DEFAULT_RECIPE, Config, Overrides, Version, prepare_zenml

if TYPE_CHECKING:
    from zenml.models import ArtifactVersionResponse

    from llm_engineering.publish.model_card import DatasetFacts, ModelCardFacts
    from llm_engineering.recipe.settings import Settings
    from tools.model_versions.versions import Found

logger = logging.getLogger("llm_engineering.export")

# Those of llama.cpp that need no sample of text, then those of llm-compressor.
Quant = Literal[
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
    "IQ4_NL", "IQ4_XS", "FP8", "AWQ",
]  # fmt: skip


def export(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    version: Version = None,
    file_format: Annotated[
        Literal["safetensors", "gguf", "gguf-lora"],
        typer.Option(
            "--format",
            help="File format. gguf writes one file, for llama.cpp; gguf-lora only the adapter, without a merge.",
        ),
    ] = "safetensors",
    quant: Annotated[
        Quant | None,
        typer.Option(
            "--quant",
            help="Quantise the weights: FP8 and AWQ as safetensors, for vLLM; the others with --format gguf. Without it, they keep "
            "their precision.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="PATH", help="A new folder; with --format gguf or gguf-lora, a new file."),
    ] = None,
) -> int:
    """Merge, verify and register a model, and write its files.

    Without --output, the command prints the folder of the registered model. Existing files are never replaced. A quantised
    file is compared with the model, and its card has the result. So is every GGUF file if llama.cpp is installed.

    Example: `llm-engineering models export --format gguf --quant Q4_K_M --output model.gguf`
    """
    recipe = load_recipe(config, overrides or ())
    is_gguf = file_format != "safetensors"
    if is_gguf and output is None:
        raise RequestError("The name of the GGUF file is missing. Add it, for example OUTPUT=model.gguf.")
    compressed = quant if quant == "FP8" or quant == "AWQ" else None
    if compressed and (is_gguf or output is None):
        raise RequestError(
            f"QUANT={quant} is written as safetensors to a new folder: leave out FORMAT, and add OUTPUT=my-model."
        )
    if quant is not None and not compressed and file_format != "gguf":
        raise RequestError(f"QUANT={quant} needs FORMAT=gguf. As safetensors, QUANT is FP8 or AWQ.")
    if output is not None:
        _check_output(output, is_gguf)
    if compressed:
        from llm_engineering.publish.exports.compressed import check_compressed
        from llm_engineering.publish.merge import merged_device

        check_compressed(compressed, merged_device(recipe.compute.here))
    elif quant is not None or file_format == "gguf-lora":
        from llm_engineering.publish.exports.llama_cpp import check_installed

        check_installed(f"QUANT={quant}" if quant else "FORMAT=gguf-lora")
    from llm_engineering.publish.model_card import render_model_card
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    settings.check_writable()
    prepare_zenml()
    from tools.model_versions.signatures import VERSION, check_signature, signed_model
    from tools.model_versions.versions import copy_model, find_model

    found = find_model(recipe, version)
    logger.info("%s", found.described)
    if is_gguf:
        from transformers import AutoTokenizer

        from llm_engineering.models.base_model import load_config
        from llm_engineering.models.revision import check_unchanged
        from llm_engineering.publish.exports.gguf import check_gguf, export_lora

        # Before the files of the version are read.
        check_signature(found.version, VERSION, settings)
        check_unchanged(found.base)
        base, trained = load_config(found.base, settings), found.folders[found.name]
        # Before the merge, which takes minutes. Training changes neither.
        check_gguf(base, AutoTokenizer.from_pretrained(trained))
        if file_format == "gguf-lora":
            assert output is not None
            export_lora(trained, base, output)
            print(output)
            return 0
    folder, signature = signed_model(found, recipe, settings)
    if output is None:
        print(folder)
        return 0
    if is_gguf or compressed:
        _write_checked(found, folder, recipe, quant, output, settings)
    else:
        files = {name: file.read_bytes() for name, file in signature.items()}
        files["README.md"] = render_model_card(card_facts(found, folder, recipe)).encode()
        copy_model(folder, files, output)
    print(output)
    return 0


def _write_checked(
    found: Found, folder: Path, recipe: Recipe, quant: Quant | None, output: Path, settings: Settings
) -> None:
    """Write a GGUF file or a quantised model, and its card with what was measured on it.

    A GGUF file is not measured, and has no card, if llama.cpp is not installed.
    """
    from llm_engineering.evaluation.measures.exam import ExamRow
    from llm_engineering.publish.exports import llama_cpp
    from llm_engineering.publish.exports.gguf import export_gguf, write_gguf
    from llm_engineering.publish.model_card import render_model_card
    from tools.model_versions.versions import formatted_rows

    compressed = quant if quant == "FP8" or quant == "AWQ" else None
    if not compressed and not llama_cpp.is_installed():
        write_gguf(folder, output, recipe.name)
        logger.warning(
            "The file was not compared with the model, because llama.cpp is not installed. %s", llama_cpp.INSTALL
        )
        return
    facts = card_facts(found, folder, recipe)
    exam = facts.report.get("exam") or {"rows": [], "max_new_tokens": 0}
    asked = [
        (ExamRow(question=row["question"], answers=row["accepted"]), row["answers"][found.name]["right"])
        for row in exam["rows"]
        if row["kind"] == "single"
    ]
    rows, most = formatted_rows(found), exam["max_new_tokens"]
    if compressed:
        from llm_engineering.publish.exports.compressed import CALIBRATION_ROWS, export_compressed

        calibration = [row.input_ids for row in formatted_rows(found, "train", CALIBRATION_ROWS)]
        check = export_compressed(folder, output, recipe, compressed, rows, asked, most, calibration, settings)
        card = output / "README.md"
    else:
        check = export_gguf(folder, output, recipe, quant, rows, asked, most, settings)
        card = card_of(output)
    card.write_text(render_model_card(facts.model_copy(update={"file": check})), encoding="utf-8")


def card_of(output: Path) -> Path:
    """The card of a GGUF file, beside it."""
    return output.with_name(f"{output.name}.md")


def push(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    version: Version = None,
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo", metavar="OWNER/NAME", help="The repository on the hub. Default: the recipe's hub.repo_id."
        ),
    ] = None,
    public: Annotated[
        bool,
        typer.Option("--public", help="Publish in a public repository. Default: as hub.private of the recipe says."),
    ] = False,
) -> int:
    """Publish a merged, verified model on the Hugging Face Hub.

    The recipe must name the licence: `--set hub.license=apache-2.0`.

    Example: `llm-engineering models push --repo someone/handbook-assistant`
    """
    recipe = load_recipe(config, overrides or ())
    hub = recipe.hub
    if hub is None:
        raise RequestError(
            "The recipe names no licence for publishing the model. Add one, for example "
            "--set hub.license=apache-2.0 (`other` if it has no short name)."
        )
    repo_id = repo or hub.repo_id
    if repo_id is None:
        raise RequestError("The repository is not set: add --repo owner/name, or hub.repo_id to the recipe.")
    private = hub.private and not public

    from llm_engineering.publish.hub import check_repo_id, find_token, publish
    from llm_engineering.publish.model_card import base_licence, render_model_card
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    check_repo_id(repo_id)
    find_token(settings.hf_token)
    prepare_zenml()
    from tools.model_versions.signatures import signed_model
    from tools.model_versions.versions import find_model

    found = find_model(recipe, version)
    base = base_licence(found.base.name_or_path, hub)
    if base is None:
        raise RequestError(
            f"The licence of the base model {found.base.name_or_path} is unknown, and the card must name it. "
            "Add it to the recipe, for example --set hub.base_license=llama3.1."
        )
    logger.info("Model:       %s", found.described)
    folder, signature = signed_model(found, recipe, settings)
    facts = card_facts(found, folder, recipe)
    logger.info("Licences:    model %s, base model %s", hub.license, base)
    logger.info("Publishing:  %s, %s", repo_id, "private" if private else "PUBLIC: everyone can read it")
    files: dict[str, bytes | Path] = {
        str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    files.update(signature)
    files["README.md"] = render_model_card(facts).encode()
    print(publish("model", files, repo_id, private, settings.hf_token, _is_ours))
    return 0


def card_facts(found: Found, merged: Path, recipe: Recipe) -> ModelCardFacts:
    """The facts for the card of a merged model.

    Args:
        recipe: the recipe of the command, for the licences and the repository. The rest comes from the version.

    Raises:
        RequestError: the version was made with another version of the recipe's schema, or was not evaluated.
    """
    from llm_engineering.publish.merge import VERIFICATION
    from llm_engineering.publish.model_card import ModelCardFacts
    from llm_engineering.publish.verification import Verification
    from tools.model_versions.versions import newest_artifacts

    number, made_with = found.version.number, recipe_of(found.version)
    own = newest_artifacts(found.version)
    if "evaluation_report" not in own:
        raise RequestError(
            f"Version {number} of {recipe.name} was not evaluated, so its card would have no results. "
            "Run the training command again."
        )
    kinds: dict[str, str] = {}
    for stage in made_with.chain_to(found.name):
        kinds.setdefault(STAGES[stage].rows, f"formatted_{stage}")
    adapter = own[f"{found.name}_adapter"]
    return ModelCardFacts(
        recipe=made_with,
        hub=recipe.hub,
        version=number,
        stage=found.name,
        datasets=[dataset_facts(kind, formatted, own, made_with) for kind, formatted in kinds.items()],
        report=own["evaluation_report"].load().report(),
        verification=Verification.model_validate_json((merged / VERIFICATION).read_text(encoding="utf-8")),
        data_limits=data_limits(list(kinds), made_with),
        lineage={
            "run": adapter.run.name,
            "recipe": str(found.version.run_metadata["recipe_hash"]),
            "code": str(found.version.run_metadata["code_version"]),
            **{f"{name} version {a.version}": a.content_hash or "no hash recorded" for name, a in own.items()},
        },
    )


def recipe_of(version: Any) -> Recipe:
    """The recipe that a version was made with.

    Raises:
        RequestError: its schema is another one, or the run ended before the gate.
    """
    what = f"Version {version.number} of {version.model.name}"
    return stored_recipe(version.run_metadata, what, "Run the training command again.")


def data_limits(kinds: Sequence[str], recipe: Recipe) -> list[str]:
    """The limits of the data of these kinds, a sentence each."""
    from llm_engineering.publish.dataset_card import limits

    return list(dict.fromkeys(limit for kind in kinds for limit in limits(kind, recipe.data)))


def dataset_facts(kind: str, formatted: str, own: dict[str, ArtifactVersionResponse], recipe: Recipe) -> DatasetFacts:
    """The facts about the dataset of a kind.

    Args:
        formatted: name of the artifact with its formatted rows, which has the number of tokens.
        own: the artifacts of a version by name.
    """
    from llm_engineering.publish.dataset_card import PEOPLE_SAID, public_name
    from llm_engineering.publish.model_card import DatasetFacts

    dataset = own[f"{kind}_dataset"]
    facts: Any = dataset.run_metadata
    source = recipe.data.own(kind)
    if recipe.data.only_people(kind):
        source, hashed = PEOPLE_SAID, own[f"human_{kind}"].content_hash
    else:
        # Generated pairs are made from the instructions, so both have the same origin.
        origin = (
            own[f"{recipe.data.made_of(kind)}_candidates"]
            if source is not None
            else own.get("documents", own.get("instruction_candidates"))
        )
        assert origin is not None
        hashed = str(origin.run_metadata["content_hash"])
    return DatasetFacts(
        name=dataset.artifact.name,
        source=public_name(
            source or (recipe.data.file("instruction") if kind != "text" else None) or recipe.documents.path
        ),
        hash=str(hashed),
        rows={split: facts[split] for split in ("train", "validation", "test")},
        tokens=int(str(own[formatted].run_metadata["tokens"])) if formatted in own else None,
        set_aside=facts["quarantined"],
        version=str(dataset.version),
        sha256=dataset.content_hash,
    )


def _check_output(output: Path, is_gguf: bool) -> None:
    """Refuse an output path that already exists (an empty folder is accepted), before any work."""
    for file in (output, card_of(output)) if is_gguf else ():
        if file.exists():
            raise RequestError(f"OUTPUT {file} exists, and existing files are never replaced. Choose another file.")
    if is_gguf and not output.parent.is_dir():
        raise RequestError(
            f"OUTPUT {output} cannot be written: the folder {output.parent} does not exist. Create it first."
        )
    if not is_gguf and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"OUTPUT {output} exists and is not an empty folder. Choose another folder.")


def _is_ours(file: str) -> bool:
    """Whether a file of the repository is part of a model.

    `publish` removes such files if this push does not write them. Otherwise old weights would stay and be loaded.
    """
    is_inside = "/" in file and not file.startswith("additional_chat_templates/")
    return not is_inside and file.endswith((".safetensors", ".json", ".jinja", ".sig"))
