"""The trials of a sweep, without their training."""

from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.sweep_block import SweepConfig
from tests.conftest import ROOT
from tools.sweeps import trials
from tools.sweeps.trials import REASON, Sweep, run_trials

RECIPE = str(ROOT / "configs" / "python_reference.yaml")


def test_a_value_that_a_library_refuses_fails_its_trials_and_the_sweep_goes_on(settings, monkeypatch):
    def train(sweep, values, name, trial_id):
        if values["sft.adam_beta2"] == 1.0:
            raise ValueError("Invalid beta parameter at index 1: 1.0")
        return 2.0

    monkeypatch.setattr(trials, "_train", train)
    block = SweepConfig.model_validate({"ranges": {"sft.adam_beta2": {"choices": [0.99, 1.0]}}, "trials": 6})
    sweep = Sweep(RECIPE, (), load_recipe(RECIPE), block, "sft", "betas")
    sweep.folder.mkdir(parents=True)
    run_trials(sweep)
    ended = {(trial.params["sft.adam_beta2"], trial.state.name) for trial in sweep.study.trials}
    assert ended == {(0.99, "COMPLETE"), (1.0, "FAIL")}
    failed = next(trial for trial in sweep.study.trials if trial.state.name == "FAIL")
    assert failed.user_attrs[REASON] == "Invalid beta parameter at index 1: 1.0"
    assert len(sweep.study.trials) == 6
