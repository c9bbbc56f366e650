"""The plan of a run, which `--dry-run` prints: the resolved recipe, the steps, the rows to expect, memory and time."""

from __future__ import annotations

import yaml

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK, rows_of
from llm_engineering.recipe.evaluation_blocks import EMBEDDED_CONTROL, GENERATED_EXAM
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stages import FIRST_OF_KIND, STAGES
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


def planned_steps(pipeline: str, recipe: Recipe) -> list[str]:
    """The steps of a pipeline with this recipe. ZenML may run those that do not depend on each other in another order."""
    trained = stages_of(pipeline, recipe)
    last = trained[-1] if trained else recipe.chain[-1]
    made: list[str] = []
    for kind in recipe.kinds(last):
        made += [step for step in _dataset_steps(kind, recipe) if step not in made]
    if not trained:
        return made
    kinds: set[str] = set()
    for stage in recipe.chain_to(last):
        if stage in trained or STAGES[stage].rows not in kinds:
            made.append(f"format_{stage}")
        made += [f"train_{stage}"] if stage in trained else []
        kinds.add(STAGES[stage].rows)
    made += [f"format_{FIRST_OF_KIND[kind]}" for kind in recipe.kinds(last) if kind not in kinds]
    made += ["read_documents"] if recipe.reads_documents and "read_documents" not in made else []
    # A run that needs no instructions still takes the exam.
    made += [step for step in ("generate_instructions", "write_exam") if _writes_exam(recipe) and step not in made]
    return [*made, f"evaluate_{last}", "promote"]


def _dataset_steps(kind: str, recipe: Recipe) -> list[str]:
    """The steps that make the dataset of a kind."""
    own, source = recipe.data.own(kind), recipe.data.made_of(kind)
    people = [f"add_human_{rows_of(kind)}"] if recipe.data.people(kind) else []
    if source != kind:
        return [*_dataset_steps(source, recipe), "label_preferences", *people, "prepare_labelled"]
    reading = ["read_documents"] if kind == "text" or recipe.data.file("instruction") is None else []
    make = f"collect_{kind}s" if kind in ("text", "prompt") else f"generate_{kind}s"
    exam = ["write_exam"] if kind == "instruction" and _writes_exam(recipe) else []
    if kind == "text" and recipe.derives_from_questions:
        reading = list(dict.fromkeys([*reading, *_dataset_steps("instruction", recipe)]))
    made = [f"load_{rows_of(kind)}"] if own is not None else [] if kind == "labelled" else [*reading, make]
    return [*made, *exam, *people, f"prepare_{rows_of(kind)}"]


def _writes_exam(recipe: Recipe) -> bool:
    return recipe.exam is not None and recipe.exam.is_generated


def print_plan(pipeline: str, recipe: Recipe) -> None:
    """Print the resolved recipe as YAML, the steps, the rows to expect, and an estimate of training's memory and time."""
    check_local_datasets(recipe)
    if recipe.exam is not None and {recipe.exam.path, recipe.exam.control} - _EXAMS_OF_THE_PROJECT:
        # This import takes seconds.
        from llm_engineering.evaluation.requirements import check_exam

        check_exam(recipe)
    recipe = with_held_out_documents(recipe)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    print(f"\nWould run {pipeline}: {' → '.join(planned_steps(pipeline, recipe))}")
    trained = stages_of(pipeline, recipe)
    before = [stage for stage in recipe.chain_to(trained[-1]) if stage not in trained] if trained else []
    if before:
        print(f"If no {before[-1]} model of this recipe is registered, the pipeline {before[-1]} runs first.")
    try:
        check_model(recipe)
    except (OSError, ValueError) as error:
        print(f"Not checked against the model: its configuration cannot be read ({first_line(error)}).")
    source = Source(recipe)
    rows = data_lines(recipe, trained[-1] if trained else recipe.chain[-1], source)
    if rows:
        print("\n" + "\n".join(rows))
    print("\n" + "\n".join(estimate_lines(recipe, trained, source)))
