"""The pipelines: documents → datasets → SFT → DPO → evaluation → promotion."""

from typing import Any

from zenml import pipeline

from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting, PreferenceWriting
from llm_engineering.recipe.recipe import Recipe
from pipelines.inputs import Inputs
from pipelines.promote import promote
from steps.data import (
    format_instructions,
    format_preferences,
    generate_instructions,
    generate_preferences,
    load_instructions,
    load_preferences,
    prepare_instructions,
    prepare_preferences,
    read_documents,
)
from steps.evaluation import evaluate_dpo, evaluate_sft
from steps.training import train_dpo, train_sft


@pipeline
def generate_datasets(recipe: Recipe, inputs: Inputs) -> None:
    """Generate both datasets, without training."""
    documents = _documents(recipe, inputs)
    _preferences(recipe, inputs, documents, _instructions(recipe, inputs, documents))


@pipeline
def sft(recipe: Recipe, inputs: Inputs, incumbent: Any = None) -> None:
    """Documents to an evaluated SFT adapter. `incumbent` is the adapter in production; None if there is none."""
    instructions = _instructions(recipe, inputs, _documents(recipe, inputs))
    formatted, adapter, training = _train_sft(recipe, inputs, instructions)
    report = evaluate_sft(
        formatted, instructions, adapter, training, recipe.evaluation, recipe.evaluation_setup, inputs.checks, incumbent
    )
    promote(report, recipe, inputs.code, inputs.incumbent)


@pipeline
def dpo(recipe: Recipe, inputs: Inputs, sft_adapter: Any, incumbent: Any = None) -> None:
    """Documents and an SFT adapter to an evaluated DPO adapter. `incumbent` as in `sft`."""
    documents = _documents(recipe, inputs)
    instructions = _instructions(recipe, inputs, documents)
    formatted, _ = format_instructions(instructions, recipe.model, recipe.formatting)
    _train_and_judge_dpo(recipe, inputs, documents, instructions, formatted, sft_adapter, incumbent)


@pipeline
def retrain(recipe: Recipe, inputs: Inputs, incumbent: Any = None) -> None:
    """The whole chain as one run. `incumbent` as in `sft`."""
    documents = _documents(recipe, inputs)
    instructions = _instructions(recipe, inputs, documents)
    formatted, adapter, _ = _train_sft(recipe, inputs, instructions)
    _train_and_judge_dpo(recipe, inputs, documents, instructions, formatted, adapter, incumbent)


def _documents(recipe: Recipe, inputs: Inputs) -> Any:
    """Read the documents to generate instructions from; None if the recipe names the user's own dataset."""
    if recipe.data.instructions is not None:
        return None
    return read_documents(recipe.documents, inputs.documents)


def _instructions(recipe: Recipe, inputs: Inputs, documents: Any) -> Any:
    data = recipe.data
    if data.instructions is not None:
        candidates = load_instructions(
            data.instructions, data.test_instructions, data.format, data.columns, inputs.instructions
        )
    else:
        candidates = generate_instructions(
            documents,
            recipe.documents,
            recipe.model,
            recipe.formatting.chat_template,
            recipe.compute.one_process,
            recipe.generation.part(ClientConfig),
            recipe.generation.part(InstructionWriting),
            recipe.seed,
        )
    return prepare_instructions(candidates, data.checks, inputs.evaluation)


def _preferences(recipe: Recipe, inputs: Inputs, documents: Any, instructions: Any) -> Any:
    data = recipe.data
    if data.preferences is not None:
        candidates = load_preferences(
            data.preferences, data.test_preferences, data.format, data.columns, inputs.preferences
        )
    else:
        candidates = generate_preferences(
            instructions,
            documents,
            recipe.model,
            recipe.formatting.chat_template,
            recipe.compute.one_process,
            recipe.generation.rejecting_client,
            recipe.generation.part(PreferenceWriting),
            recipe.seed,
        )
    return prepare_preferences(candidates, data.checks, inputs.evaluation)


def _train_sft(recipe: Recipe, inputs: Inputs, instructions: Any) -> tuple[Any, Any, Any]:
    formatted, _ = format_instructions(instructions, recipe.model, recipe.formatting)
    adapter, training = train_sft(formatted, recipe.sft, recipe.setup, inputs.sft_recipe)
    return formatted, adapter, training


def _train_and_judge_dpo(
    recipe: Recipe,
    inputs: Inputs,
    documents: Any,
    instructions: Any,
    formatted: Any,
    sft_adapter: Any,
    incumbent: Any,
) -> None:
    preferences = _preferences(recipe, inputs, documents, instructions)
    formatted_dpo, _ = format_preferences(preferences, recipe.model, recipe.formatting)
    adapter, training = train_dpo(formatted_dpo, sft_adapter, recipe.dpo, recipe.setup, inputs.dpo_recipe)
    report = evaluate_dpo(
        formatted,
        formatted_dpo,
        instructions,
        preferences,
        sft_adapter,
        adapter,
        training,
        recipe.evaluation,
        recipe.evaluation_setup,
        inputs.checks,
        incumbent,
    )
    promote(report, recipe, inputs.code, inputs.incumbent, sft_adapter)
