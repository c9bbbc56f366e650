"""The trial of a sweep that a training run belongs to: it gets the validation losses, and stops trials that are behind.

The process that runs the trial names it in an environment variable, so that worker processes of the training find it too.
The trial is no input of the training: a trial that ends has the model of the same run without a sweep.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_engineering.errors import WorkError
from llm_engineering.training.processes import ranks

# Environment variable with the trial as JSON.
TRIAL = "LLM_SWEEP_TRIAL"
# Attribute of the study: the hash of the validation rows of the first trial.
ROWS = "validation_rows"
# Attribute of a trial: the step at which it was stopped.
STOPPED = "stopped"


class Place(BaseModel):
    """Where a trial is stored.

    Attributes:
        storage: optuna's address of the storage.
        stage: the stage whose validation loss decides.
        prune_after: the number of trials that are not stopped; None if none is.
    """

    storage: str
    study: str
    trial: int
    stage: str
    prune_after: int | None


class TrialCallback(TrainerCallback):
    """Reports each validation loss, and stops training if the pruner says so.

    Losses are compared at the same share of training, in thousandths: trials may have other numbers of steps.
    """

    def __init__(self, place: Place) -> None:
        self.stopped: int | None = None
        self.trial: Any = None
        self.study: Any = None
        if ranks.is_main():
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            after = place.prune_after
            pruner = optuna.pruners.NopPruner() if after is None else optuna.pruners.MedianPruner(after)
            self.study = optuna.load_study(study_name=place.study, storage=place.storage, pruner=pruner)
            self.trial = optuna.trial.Trial(self.study, place.trial)

    def check_rows(self, digest: str) -> None:
        """Check that the validation rows are those of the first trial.

        Raises:
            WorkError: they differ, so the losses could not be compared.
        """
        if not ranks.is_main():
            return
        first = self.study.user_attrs.get(ROWS)
        if first is None:
            self.study.set_user_attr(ROWS, digest)
        elif first != digest:
            raise WorkError(
                "The validation rows of this trial are not those of the first one, so their losses cannot be compared. Remove the "
                "ranges that change the rows from sweep.ranges."
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the loss. Training that has ended is not stopped."""
        assert metrics is not None
        stops = False
        if ranks.is_main():
            self.trial.report(metrics["eval_loss"], round(1000 * state.global_step / state.max_steps))
            stops = state.global_step < state.max_steps and self.trial.should_prune()
            if stops:
                self.trial.set_user_attr(STOPPED, state.global_step)
        if ranks.from_main(stops):
            self.stopped = state.global_step
            control.should_training_stop = True

    def end(self, stage: str, checkpoints: str, steps: int) -> None:
        """End a run that was stopped. Its checkpoints are deleted, because nothing will resume it.

        Raises:
            WorkError: the run was stopped.
        """
        if self.stopped is not None:
            if ranks.is_main():
                shutil.rmtree(checkpoints, ignore_errors=True)
            raise WorkError(
                f"{stage} was stopped after step {self.stopped} of {steps}: its validation loss was above the median of the "
                "earlier trials."
            )


def open_trial(stage: str) -> TrialCallback | None:
    """The trial that this process trains for; None outside of a sweep, and in the stages before the one that decides."""
    text = os.environ.get(TRIAL)
    place = Place.model_validate_json(text) if text else None
    return TrialCallback(place) if place is not None and place.stage == stage else None
