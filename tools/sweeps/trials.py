"""The trials of a sweep: their storage, their values, and their runs.

Trials are stored in a file of optuna's in the folder of the sweep, so a sweep continues that has ended at any moment.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.process import is_running, this_process
from llm_engineering.recipe.loading import load_recipe, value_at
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.sweep_block import Range, SweepConfig

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger("llm_engineering.sweep")

# Environment variable with the number of a process that runs trials for another one.
WORKER = "LLM_SWEEP_WORKER"
# Attributes of the study: the numbers of killed trials, and the losses of the winner's recipe by trial and seed.
KILLED, REPEATS = "killed", "repeats"
# Attributes of a trial: why it ended without a loss, and the name of its run.
REASON, RUN = "reason", "run"


@dataclass(frozen=True)
class Sweep:
    """A sweep whose ranges are checked.

    Attributes:
        recipe: the recipe without its block `sweep`, which is `block`.
        stage: the stage whose validation loss decides.
        name: the recipe's name and a hash of everything that the trials share.
    """

    config: str
    overrides: tuple[str, ...]
    recipe: Recipe
    block: SweepConfig
    stage: str
    name: str

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return Settings().llm_output_dir.resolve() / "sweeps" / self.name

    @property
    def storage(self) -> str:
        """The address of the trials, as optuna names it."""
        return f"sqlite:///{self.folder / 'trials.db'}"

    @cached_property
    def study(self) -> optuna.Study:
        """The trials. The first one has the recipe's own values that lie in the ranges."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with FileLock(self.folder / "trials.lock"):
            study = optuna.create_study(study_name=self.name, storage=self.storage, load_if_exists=True)
            if not study.trials:
                inside = {key: value for key, value in self.own.items() if self.block.ranges[key].holds(value)}
                study.enqueue_trial(inside)
        return study

    @property
    def own(self) -> dict[str, Any]:
        """The recipe's own values; None for a field of a library that the recipe does not set."""
        dumped = self.recipe.model_dump(mode="json")
        return {key: value_at(dumped, key) for key in self.block.ranges}

    def sets(self, values: dict[str, Any]) -> tuple[str, ...]:
        """The arguments of `--set` with which a run has these values."""
        return (*self.overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items()))

    def with_values(self, values: dict[str, Any]) -> Recipe:
        """The recipe of a trial. `sweep` is no part of it, so that its steps are those of a run without a sweep."""
        return load_recipe(self.config, (*self.sets(values), "sweep=null"))

    def winner(self) -> optuna.trial.FrozenTrial:
        """The trial with the lowest validation loss.

        Raises:
            WorkError: no trial has one, or one still runs, as for a second after its sweep was killed.
        """
        running = [str(trial.number + 1) for trial in self.study.trials if trial.state.name == "RUNNING"]
        if running:
            raise WorkError(
                f"Trial {', '.join(running)} of {self.name} still runs in another process. Repeat the command later."
            )
        try:
            return self.study.best_trial
        except ValueError:
            reasons = [str(trial.user_attrs[REASON]) for trial in self.study.trials if REASON in trial.user_attrs]
            raise WorkError(
                f"No trial of {self.name} has ended with a validation loss. The last one: {reasons[-1]}"
            ) from None


def run_trials(sweep: Sweep) -> None:
    """Run trials until there are as many as the recipe says."""
    import optuna

    from llm_engineering.training.trainer.trial import STOPPED

    while True:
        trial = next_trial(sweep)
        if trial is None:
            return
        shown = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in trial.params.items()
        )
        logger.info("Trial %d: %s", trial.number + 1, shown)
        try:
            loss = _train(sweep, trial.params, trial.user_attrs[RUN], trial_id=trial._trial_id)
        # A library may refuse the values with any error. A trial left as running would be run again with the same values.
        except Exception as error:
            stopped = STOPPED in sweep.study.get_trials(deepcopy=False)[trial.number].user_attrs
            trial.set_user_attr(REASON, str(error) or type(error).__name__)
            sweep.study.tell(trial, state=optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.FAIL)
            logger.info(
                "Trial %d %s: %s",
                trial.number + 1,
                "was stopped" if stopped else "failed",
                error,
                exc_info=not isinstance(error, (RequestError, WorkError)),
            )
        else:
            sweep.study.tell(trial, loss)
            logger.info("Trial %d: validation loss %.4f", trial.number + 1, loss)


def next_trial(sweep: Sweep) -> optuna.Trial | None:
    """Begin the next trial; None if there are enough. Trials of killed processes are run again with the same values."""
    import numpy as np
    import optuna

    study, states = sweep.study, optuna.trial.TrialState
    with FileLock(sweep.folder / "trials.lock"):
        for begun in study.get_trials(states=[states.RUNNING]):
            if is_running(begun.user_attrs):
                continue
            study.set_user_attr(KILLED, [*study.user_attrs.get(KILLED, []), begun.number])
            study.tell(begun.number, state=states.FAIL)
            study.enqueue_trial(begun.params)
            logger.info("Trial %d was interrupted, and goes on with the same values", begun.number + 1)
        if len(counted(study)) >= sweep.block.trials:
            return None
        # A sampler with the same seed would draw the same values again in each process and after each start.
        numbers = [sweep.block.seed, len(study.trials), int(os.environ.get(WORKER, "0"))]
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = study.ask({key: _distribution(values) for key, values in sweep.block.ranges.items()})
        trial.set_user_attr(RUN, f"{sweep.name}-trial-{trial.number + 1}")
        for name, value in this_process().items():
            trial.set_user_attr(name, value)
        return trial


def counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have begun, without killed ones."""
    import optuna

    killed = study.user_attrs.get(KILLED, [])
    waiting = optuna.trial.TrialState.WAITING
    return [t for t in study.get_trials(deepcopy=False) if t.number not in killed and t.state != waiting]


def repeat(sweep: Sweep, winner: optuna.trial.FrozenTrial) -> list[float]:
    """Train the winner's recipe with other seeds; returns the validation losses. Losses of an earlier call are kept."""
    known = dict(sweep.study.user_attrs.get(REPEATS, {}))
    names = [f"{winner.number} {sweep.recipe.seed + number}" for number in range(1, sweep.block.repeats + 1)]
    for name in names:
        if name not in known:
            number, seed = name.split()
            logger.info("Trial %d again, with the seed %s", winner.number + 1, seed)
            known[name] = _train(
                sweep, winner.params, f"{sweep.name}-trial-{int(number) + 1}-seed-{seed}", seed=int(seed)
            )
            sweep.study.set_user_attr(REPEATS, known)
    return [known[name] for name in names]


def _train(
    sweep: Sweep, values: dict[str, Any], name: str, trial_id: int | None = None, seed: int | None = None
) -> float:
    """Train the chain up to the sweep's stage as a run with this name; returns the validation loss.

    Raises:
        WorkError: training failed or was stopped, or the loss is not finite.
    """
    from llm_engineering.evaluation.selection import validation_loss
    from llm_engineering.training.trainer.trial import TRIAL, Place
    from pipelines.chain import sweep_trial
    from tools.readiness import check_and_pin
    from tools.run import start

    recipe, inputs = check_and_pin(sweep.with_values(values))
    if trial_id is not None:
        place = Place(
            storage=sweep.storage,
            study=sweep.name,
            trial=trial_id,
            stage=sweep.stage,
            prune_after=sweep.block.prune_after,
        )
        os.environ[TRIAL] = place.model_dump_json()
    # ZenML replaces the words in braces.
    named = sweep_trial.with_options(run_name=f"{name}-{{date}}-{{time}}", tags=[f"sweep {sweep.name}"])
    try:
        run = start(named, recipe, inputs, cache=True, versioned=False, stage=sweep.stage, seed=seed)
    finally:
        os.environ.pop(TRIAL, None)
    (report,) = run.steps[f"train_{sweep.stage}"].outputs["training_report"]
    loss = validation_loss(report.load().report())
    if not math.isfinite(loss):
        raise WorkError(
            f"The validation loss of {sweep.stage} is {loss}. Lower the highest learning rate of the ranges."
        )
    return loss


def _distribution(values: Range) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices is not None:
        return CategoricalDistribution(values.choices)
    assert values.low is not None
    assert values.high is not None
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
    return FloatDistribution(values.low, values.high, values.log, values.step)
