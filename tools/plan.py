"""What a run would do, without doing it: the resolved recipe, the steps, and what training would take."""

from __future__ import annotations

import yaml

from llm_engineering.recipe.recipe import Recipe
from tools.estimate import estimate_lines, stages_of


def planned_steps(pipeline: str, recipe: Recipe) -> list[str]:
    """The steps of a pipeline with this recipe, in order."""
    instructions = (
        ["load_instructions"] if recipe.data.instructions is not None else ["read_documents", "generate_instructions"]
    ) + ["prepare_instructions"]
    preferences = ["load_preferences" if recipe.data.preferences is not None else "generate_preferences"]
    preferences.append("prepare_preferences")
    dpo = [*preferences, "format_preferences", "train_dpo", "evaluate_dpo", "promote"]
    return {
        "datasets": [*instructions, *preferences],
        "sft": [*instructions, "format_instructions", "train_sft", "evaluate_sft", "promote"],
        "dpo": [*instructions, "format_instructions", *dpo],
        "retrain": [*instructions, "format_instructions", "train_sft", *dpo],
    }[pipeline]


def print_plan(pipeline: str, recipe: Recipe) -> None:
    """Print the resolved recipe as YAML, the steps, and the memory and time that training would take here."""
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    print(f"\nWould run {pipeline}: {' → '.join(planned_steps(pipeline, recipe))}")
    if pipeline == "dpo":
        print("If no SFT model of this recipe is registered, sft runs first.")
    print("\n" + "\n".join(estimate_lines(recipe, stages_of(pipeline))))
