"""The pipelines: documents → datasets → SFT → DPO → evaluation → promotion."""

from typing import Any

from zenml import pipeline

from llm_engineering.config import Recipe
from pipelines.inputs import Inputs
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
from steps.evaluation import evaluate_dpo, evaluate_sft, promote
from steps.training import train_dpo, train_sft


@pipeline
def generate_datasets(recipe: Recipe, inputs: Inputs) -> None:
    """Both datasets, without training."""
    _preferences(recipe, inputs, _instructions(recipe, inputs))


@pipeline
def sft(recipe: Recipe, inputs: Inputs) -> None:
    """Documents to an evaluated SFT adapter."""
    instructions = _instructions(recipe, inputs)
    formatted, adapter = _train_sft(recipe, inputs, instructions)
    report = evaluate_sft(formatted, instructions, adapter, recipe.evaluation, recipe.setup)
    promote(report, recipe, inputs.code)


@pipeline
def dpo(recipe: Recipe, inputs: Inputs, sft_adapter: Any) -> None:
    """Documents and an SFT adapter to an evaluated DPO adapter."""
    instructions = _instructions(recipe, inputs)
    formatted, _ = format_instructions(instructions, recipe.model, recipe.formatting)
    _train_and_judge_dpo(recipe, inputs, instructions, formatted, sft_adapter)


@pipeline
def retrain(recipe: Recipe, inputs: Inputs) -> None:
    """The whole chain as one run."""
    instructions = _instructions(recipe, inputs)
    formatted, adapter = _train_sft(recipe, inputs, instructions)
    _train_and_judge_dpo(recipe, inputs, instructions, formatted, adapter)


def _instructions(recipe: Recipe, inputs: Inputs) -> Any:
    data = recipe.data
    if data.instructions is not None:
        candidates = load_instructions(
            data.instructions, data.test_instructions, data.format, data.columns, inputs.instructions
        )
    else:
        candidates = generate_instructions(
            read_documents(recipe.documents, inputs.documents),
            recipe.documents,
            recipe.model,
            recipe.compute,
            recipe.generation.batch_size,
            recipe.generation.question_max_new_tokens,
            recipe.seed,
        )
    return prepare_instructions(candidates, data.checks, inputs.evaluation)


def _preferences(recipe: Recipe, inputs: Inputs, instructions: Any) -> Any:
    data = recipe.data
    if data.preferences is not None:
        candidates = load_preferences(
            data.preferences, data.test_preferences, data.format, data.columns, inputs.preferences
        )
    else:
        candidates = generate_preferences(
            instructions,
            recipe.model,
            recipe.compute,
            recipe.generation.batch_size,
            recipe.generation.rejected_max_new_tokens,
            recipe.generation.rejected_temperature,
            recipe.generation.max_preferences,
            recipe.seed,
        )
    return prepare_preferences(candidates, data.checks, inputs.evaluation)


def _train_sft(recipe: Recipe, inputs: Inputs, instructions: Any) -> tuple[Any, Any]:
    formatted, _ = format_instructions(instructions, recipe.model, recipe.formatting)
    adapter, _ = train_sft(formatted, recipe.sft, recipe.setup, inputs.sft_recipe)
    return formatted, adapter


def _train_and_judge_dpo(recipe: Recipe, inputs: Inputs, instructions: Any, formatted: Any, sft_adapter: Any) -> None:
    preferences = _preferences(recipe, inputs, instructions)
    formatted_dpo, _ = format_preferences(preferences, recipe.model, recipe.formatting)
    adapter, _ = train_dpo(formatted_dpo, sft_adapter, recipe.dpo, recipe.setup, inputs.dpo_recipe)
    report = evaluate_dpo(formatted, formatted_dpo, instructions, sft_adapter, adapter, recipe.evaluation, recipe.setup)
    promote(report, recipe, inputs.code, sft_adapter)
