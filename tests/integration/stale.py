"""Runs a pipeline without the model in production, as if a version had been promoted during the run.

Usage: python -m tests.integration.stale recipe.yaml [KEY=VALUE ...]. It prints the tables of the run.
"""

import sys

import tools.cli


def main() -> None:
    # Before any step is imported, because this sets ZenML's source root.
    tools.cli.prepare_zenml()
    from llm_engineering.recipe.loading import load_recipe
    from pipelines import chain
    from tools import results, run
    from tools.readiness import check_and_pin

    recipe, inputs = check_and_pin(load_recipe(sys.argv[1], sys.argv[2:]))
    ended = run.start(chain.stage_pipeline("sft"), recipe, inputs, True, stage="sft")
    results.print_table(results.collect([ended], 0.0), sys.stdout)


if __name__ == "__main__":
    main()
