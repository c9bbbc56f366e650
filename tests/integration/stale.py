"""A run whose production changes before it ends: it was told that nothing was in production.

python -m tests.integration.stale recipe.yaml: prints the table that every run ends with.
"""

import sys

import tools.cli
from llm_engineering.recipes import load_recipe
from pipelines import chain
from tools import launch, summary
from tools.preflight import preflight

if __name__ == "__main__":
    tools.cli.prepare_zenml()
    recipe, inputs = preflight(load_recipe(sys.argv[1]))
    run = launch._start(chain.sft, recipe, inputs, True)
    summary.print_table(summary.collect([run], 0.0), sys.stdout)
