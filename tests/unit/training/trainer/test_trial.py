"""The trial of a sweep, in a real training of the tiny model."""

import optuna
import pytest

from llm_engineering.errors import WorkError
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.training.trainer.trial import ROWS, STOPPED, TRIAL, Place
from tests.tiny_models import formatted, logged, train, training_setup

# Ten steps, with evaluations after 4, 8 and 10.
CONFIG = SFTConfig(
    learning_rate=1e-3, num_train_epochs=1, max_steps=10, per_device_train_batch_size=1, gradient_accumulation_steps=1,
    save_steps=4, eval_steps=4, packing=False, lora=LoraConfig(r=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    return formatted("instruction", 12, tokenizer, tmp_path_factory.mktemp("rows"))


@pytest.fixture
def setup(tiny_model):
    return training_setup(tiny_model, chat_template=None)


@pytest.fixture
def study(tmp_path):
    return optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path / 'trials.db'}")


def begin(study, tmp_path, monkeypatch, prune_after=2, stage="sft"):
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    place = Place(
        storage=f"sqlite:///{tmp_path / 'trials.db'}", study="s", trial=trial._trial_id, stage=stage, prune_after=prune_after
    )  # fmt: skip
    monkeypatch.setenv(TRIAL, place.model_dump_json())
    return trial


def with_earlier(study, losses):
    """Two complete trials with these losses at each tenth of the training."""
    for _ in range(2):
        trial = study.ask()
        for step, loss in losses.items():
            trial.report(loss, step)
        study.tell(trial, 0.0)


def test_each_validation_loss_is_reported_and_the_model_is_that_of_a_run_without_a_sweep(
    data, setup, settings, study, tmp_path, monkeypatch
):
    plain = train(data, CONFIG, setup, settings)
    with_earlier(study, {400: 99.0, 800: 99.0})
    trial = begin(study, tmp_path, monkeypatch)
    result = train(data, CONFIG, setup, settings)
    losses = logged(result, "eval_loss")
    assert losses == logged(plain, "eval_loss")
    found = study.trials[trial.number]
    assert found.intermediate_values == dict(zip((400, 800, 1000), losses, strict=True))
    assert STOPPED not in found.user_attrs
    # The trial is no part of what the training computes.
    weights = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (plain, result)]
    assert weights[0] == weights[1]


def test_a_trial_behind_the_median_is_stopped_and_leaves_no_checkpoint(
    data, setup, settings, study, tmp_path, monkeypatch
):
    with_earlier(study, {400: 99.0, 800: 0.01})
    trial = begin(study, tmp_path, monkeypatch)
    with pytest.raises(WorkError, match="sft was stopped after step 8 of 10"):
        train(data, CONFIG, setup, settings)
    assert study.trials[trial.number].user_attrs[STOPPED] == 8
    assert not list(settings.llm_output_dir.glob("training/*/checkpoints"))
    assert not list(settings.llm_output_dir.glob("training/*/adapter"))


@pytest.mark.parametrize("prune_after", [3, None])
def test_the_first_trials_are_not_stopped(prune_after, data, setup, settings, study, tmp_path, monkeypatch):
    with_earlier(study, {400: 0.01, 800: 0.01})
    begin(study, tmp_path, monkeypatch, prune_after)
    assert len(logged(train(data, CONFIG, setup, settings), "eval_loss")) == 3


def test_an_earlier_stage_is_no_part_of_the_trial(data, setup, settings, study, tmp_path, monkeypatch):
    trial = begin(study, tmp_path, monkeypatch, stage="dpo")
    train(data, CONFIG, setup, settings)
    assert not study.trials[trial.number].intermediate_values


def test_other_validation_rows_are_refused_before_training(data, setup, settings, study, tmp_path, monkeypatch):
    begin(study, tmp_path, monkeypatch)
    study.set_user_attr(ROWS, "of another trial")
    with pytest.raises(WorkError, match="validation rows of this trial are not those of the first one"):
        train(data, CONFIG, setup, settings)
