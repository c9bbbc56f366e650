"""The plan of a run, which `--dry-run` prints: the resolved recipe, datasets and stages, rows to expect, memory and time."""

from __future__ import annotations

import yaml

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK
from llm_engineering.recipe.evaluation_blocks import EMBEDDED_CONTROL, GENERATED_EXAM
from llm_engineering.recipe.recipe import Recipe
from tools.expected_rows import Source, data_lines
from tools.forecast import estimate_lines, first_line
from tools.recipe_checks import check_local_datasets, check_model, with_held_out_documents

_EXAMS_OF_THE_PROJECT = {EMBEDDED_HANDBOOK, EMBEDDED_CONTROL, GENERATED_EXAM, None}


def stages_of(pipeline: str, recipe: Recipe) -> list[str]:
    """The stages that a pipeline trains, in order.

    Raises:
        RequestError: the pipeline is a stage that is not in the recipe's chain.
    """
    if pipeline == "datasets":
        return []
    chain: list[str] = recipe.chain
    if pipeline == "retrain":
        return chain
    if pipeline not in chain:
        raise RequestError(
            f"The recipe's chain is {', '.join(chain)}, without the stage {pipeline}. Add it to chain, or run one of "
            "these stages."
        )
    return recipe.trained_with(pipeline)


def print_plan(pipeline: str, recipe: Recipe) -> None:
    """Print the resolved recipe as YAML, datasets and stages, the rows to expect, and an estimate of training's memory and time."""
    check_local_datasets(recipe)
    if recipe.exam is not None and {recipe.exam.path, recipe.exam.control} - _EXAMS_OF_THE_PROJECT:
        # This import takes seconds.
        from llm_engineering.evaluation.requirements import check_exam

        check_exam(recipe)
    recipe = with_held_out_documents(recipe)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    trained = stages_of(pipeline, recipe)
    last = trained[-1] if trained else recipe.chain[-1]
    parts = [f"datasets {', '.join(recipe.kinds(last))}"]
    parts += [", ".join(trained), "evaluation and gate"] if trained else []
    print(f"\nWould run {pipeline}: {' → '.join(parts)}")
    before = [stage for stage in recipe.chain_to(trained[-1]) if stage not in trained] if trained else []
    if before:
        print(f"If no {before[-1]} model of this recipe is registered, the pipeline {before[-1]} runs first.")
    try:
        check_model(recipe)
    except (OSError, ValueError) as error:
        print(f"Not checked against the model: its configuration cannot be read ({first_line(error)}).")
    source = Source(recipe)
    rows = data_lines(recipe, last, source)
    if rows:
        print("\n" + "\n".join(rows))
    print("\n" + "\n".join(estimate_lines(recipe, trained, source)))
