"""A stage that the project does not have: SFT with twice the learning rate.

As a script, this file adds the stage to the table and calls the command line with each of its arguments, which is a JSON
list: `python toy_stage.py '["run", "toy"]' '["models", "list"]'`. A stage needs a block, a function that trains, and a row of the table.
"""

import json
import sys
from pathlib import Path

from llm_engineering.recipe.stage_blocks import SFTConfig


class ToyConfig(SFTConfig):
    """SFT with `times` the learning rate."""

    times: float = 2.0


def train_toy(job, data, settings):
    """Train a job of the stage in this process."""
    from llm_engineering.training.sft import sft_trainer
    from llm_engineering.training.train import run_training
    from llm_engineering.training.training_run import prepare_run

    rate = job.config["times"] * job.config["learning_rate"]
    job = job.model_copy(update={"config": {**job.config, "learning_rate": rate}})
    run = prepare_run(job, ToyConfig, data, settings)
    return run_training(run, lambda config: sft_trainer(run, run.load_policy(), config))


def main() -> int:
    """Add the stage to the table, and run the commands until one fails; returns its exit code."""
    from llm_engineering.recipe import stages

    module = "tests.integration.toy_stage"
    stages.STAGES["toy"] = stages.Stage("toy", "instruction", ToyConfig, (module, "train_toy"), "a toy")
    from tools.cli import main as run_command

    return next((code for argument in sys.argv[1:] if (code := run_command(json.loads(argument)))), 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
