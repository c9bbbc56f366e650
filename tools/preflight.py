"""Checks everything that can be checked before costly work starts, and pins what a run reads from outside."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Sequence

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.preflight import check
from llm_engineering.data.formats import dataset_hash, open_dataset
from llm_engineering.data.load import check_evaluation
from llm_engineering.documents.read import documents_hash
from llm_engineering.evaluation.requirements import check_requirements
from llm_engineering.formatting.render import check_chat_template
from llm_engineering.generation.open import check_access
from llm_engineering.models.device import check_processes, check_training, choose_backend, choose_device
from llm_engineering.models.loading import load_config, pin_revision
from llm_engineering.models.tokenizer import load_tokenizer, pin_chat_template
from llm_engineering.recipe.data_blocks import DataConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL
from llm_engineering.training.tracking import check_trackers
from llm_engineering.training.unsloth_policy import check_packable
from pipelines.inputs import Inputs
from tools.cli import PROJECT_ROOT

# A scheduled job runs the files of a checkout without its history: whoever sent them says which they were.
CODE_VARIABLE = "LLM_CODE_VERSION"
# Keys of the client that say how answers are fetched, and not which.
_HOW_NOT_WHAT = {"concurrency", "timeout_s", "max_retries", "max_total_tokens", "max_cost_usd", "prices"}


def preflight(recipe: Recipe) -> tuple[Recipe, Inputs]:
    """The recipe with its model's exact revision, and hashes of what it reads.

    Raises:
        RequestError: a file or model is missing, a dataset is in no known format, a folder cannot be written to,
            or this machine lacks what the recipe asks for.
    """
    Settings().check_writable()
    uses_unsloth = _check_machine(recipe)
    check_trackers(recipe.tracking)
    if recipe.compute.sagemaker is not None:
        check(recipe, Account.resolve(recipe.compute.sagemaker, Settings()), Settings())
    data = recipe.data
    documents = documents_hash(recipe.documents) if data.instructions is None else None
    instructions = _datasets([data.instructions, data.test_instructions], "instruction", data)
    preferences = _datasets([data.preferences, data.test_preferences], "preference", data)
    check_evaluation(data.decontaminate_against)
    evaluation = "-".join(map(dataset_hash, data.decontaminate_against)) or None
    _check_client(recipe)
    checks = check_requirements(recipe.evaluation, Settings())
    recipe = recipe.model_copy(
        update={"model": pin_revision(recipe.model), "formatting": pin_chat_template(recipe.formatting)}
    )
    _check_tokenizer(recipe)
    if uses_unsloth and recipe.sft.packing:
        check_packable(load_config(recipe.model, Settings()).model_type)
    sft_stage = {
        "inputs": [documents, instructions, evaluation],
        "client": recipe.generation.part(ClientConfig).model_dump(mode="json", exclude=_HOW_NOT_WHAT),
        "writing": recipe.generation.part(InstructionWriting).model_dump(mode="json"),
        **recipe.model_dump(mode="json", include={"model", "seed", "formatting", "sft"}),
        "documents": recipe.documents.model_dump() if instructions is None else None,
        "data": recipe.data.checks.model_dump(),
    }
    return recipe, Inputs(
        documents=documents,
        instructions=instructions,
        preferences=preferences,
        evaluation=evaluation,
        checks=checks,
        sft_recipe=recipe_hash(sft_stage),
        dpo_recipe=recipe_hash({**sft_stage, "dpo": recipe.dpo.model_dump(), "preferences": preferences}),
        code=code_version(),
    )


def _check_machine(recipe: Recipe) -> bool:
    """Check that training can run where the recipe says; whether unsloth will be its backend.

    A machine of SageMaker's is not here to be asked: with `backend: auto` only the job knows.
    """
    compute = recipe.compute
    if compute.target == "sagemaker":
        choose_device(compute.one_process)
        return compute.backend == "unsloth"
    device = choose_device(compute)
    check_processes(compute, device)
    check_training("sft", recipe.sft.method, recipe.sft.optim, device)
    check_training("dpo", recipe.sft.method, recipe.dpo.optim, device)
    return choose_backend(device, compute, recipe.sft.method, use_dora=recipe.sft.lora.use_dora).backend == "unsloth"


def _check_tokenizer(recipe: Recipe) -> None:
    """Render two turns. The embedded model's own template is known to be right; the model is unpacked when needed."""
    if recipe.model.name_or_path != EMBEDDED_MODEL or recipe.formatting.chat_template is not None:
        check_chat_template(load_tokenizer(recipe.model, Settings(), recipe.formatting.chat_template))


def _check_client(recipe: Recipe) -> None:
    """Ask the endpoint for one word, if the recipe lets one write anything."""
    writing = recipe.generation
    if recipe.data.instructions is None:
        check_access(writing.part(ClientConfig), Settings(), writing.question_max_new_tokens, "instruction")
    elif recipe.data.preferences is None and writing.rejected_by == "client":
        check_access(writing.part(ClientConfig), Settings(), writing.rejected_max_new_tokens, None)


def code_version() -> str:
    """The commit of this project, with `+changes` if files differ from it; where there is no git, what CODE_VARIABLE says."""
    if os.environ.get(CODE_VARIABLE):
        return os.environ[CODE_VARIABLE]
    git = ["git", "-C", str(PROJECT_ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {importlib.metadata.version('llm-engineering')}, not a git checkout"
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _datasets(references: Sequence[str | None], kind: str, config: DataConfig) -> str | None:
    """Open datasets once, so that a wrong one is told now, and hash them; None where none is named."""
    named = [reference for reference in references if reference is not None]
    for reference in named:
        open_dataset(reference, kind, config)
    return "-".join(map(dataset_hash, named)) or None
