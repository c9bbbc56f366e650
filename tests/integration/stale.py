"""A run whose production changes before it ends: it was told that nothing was in production.

python -m tests.integration.stale recipe.yaml: prints the table that every run ends with.
"""

import sys

import tools.cli


def main() -> None:
    # Before any step is imported: it says where the sources are.
    tools.cli.prepare_zenml()
    from llm_engineering.recipe.loading import load_recipe
    from pipelines import chain
    from tools import results, run
    from tools.plan import preflight

    recipe, inputs = preflight(load_recipe(sys.argv[1]))
    ended = run._start(chain.sft, recipe, inputs, True)
    results.print_table(results.collect([ended], 0.0), sys.stdout)


if __name__ == "__main__":
    main()
