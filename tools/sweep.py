"""The command `sweep`: trains a stage with many values of the recipe's keys, and evaluates the best of them once.

Trials are stored in a file of optuna's in the folder of the sweep, so the same command continues a sweep that has ended at
any moment.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.recipe.loading import check_name, load_recipe, recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.sweep_block import Range, SweepConfig
from tools.cli import DEFAULT_RECIPE, PROGRAM, Config, Json, Overrides, prepare_zenml

if TYPE_CHECKING:
    import optuna

    from tools.results import RunResult

logger = logging.getLogger("llm_engineering.sweep")

# Environment variable with the number of a process that runs trials for another one.
WORKER = "LLM_SWEEP_WORKER"
# Attributes of the study: the numbers of killed trials, and the losses of the winner's recipe by trial and seed.
KILLED, REPEATS = "killed", "repeats"
# Attributes of a trial: why it ended without a loss, and the name of its run.
REASON, RUN = "reason", "run"


def sweep(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Trials at the same time, each in a process with its own cards.")
    ] = 1,
    as_json: Json = False,
) -> int:
    """Train a stage with values from the ranges of the recipe's block `sweep`, and evaluate the best once.

    The lowest validation loss wins. Only the winner is measured on the test split, in a run like any other. After an
    interruption, the same command continues: finished trials are kept, and those that were running are run again.

    Example: `llm-engineering sweep --config configs/sweep.yaml --jobs 2`
    """
    found = _open(config, tuple(overrides or ()))
    if WORKER in os.environ:
        from llm_engineering.training.processes.ranks import end_with_launcher

        end_with_launcher()
        run_trials(found)
        return 0
    with _lock(found.folder / "sweep.lock", f"The sweep {found.name} runs already. Wait for it, or stop it first."):
        if jobs == 1:
            run_trials(found)
        else:
            _run_workers(found, jobs)
        started = time.monotonic()
        winner = found.winner()
        repeats = repeat(found, winner)
        run = _evaluate(found, winner, started)
    report = _report(found, winner, repeats, run)
    _write_page(found.folder, report)
    _print(report, run, sys.stderr if as_json else sys.stdout)
    logger.info("The sweep: %s", found.folder / "report.html")
    if as_json:
        shown = ("sweep", "stage", "counts", "winner", "chance")
        print(json.dumps({name: report[name] for name in shown} | {"run": run.as_json()}))
    return 0


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
        with _lock(self.folder / "trials.lock"):
            study = optuna.create_study(study_name=self.name, storage=self.storage, load_if_exists=True)
            if not study.trials:
                own = {key: _value(self.recipe, key) for key in self.block.ranges}
                study.enqueue_trial({key: value for key, value in own.items() if self.block.ranges[key].holds(value)})
        return study

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


def _open(config: str, overrides: tuple[str, ...]) -> Sweep:
    """Check the recipe and both ends of every range.

    Raises:
        RequestError: there is no block `sweep`, a key is unknown, or a value of a range is refused.
    """
    full = load_recipe(config, overrides)
    check_name(config, overrides)
    if full.sweep is None:
        raise RequestError(
            f"{config} has no block `sweep`. Name the ranges, e.g. sweep: {{ranges: {{sft.learning_rate: {{low: 1e-5, high: 1e-3, "
            "log: true}}}}."
        )
    if full.compute.sagemaker is not None:
        raise RequestError(
            "A sweep trains on this machine, and compute.target is sagemaker. Use --set compute.target=local, and start "
            "the command on the machine with the cards."
        )
    block, stage = full.sweep, full.sweep.stage_of(full.chain)
    recipe = load_recipe(config, (*overrides, "sweep=null"))
    # The imports are slow, so they come after the recipe has been checked.
    from tools.readiness import check_model, preflight

    sweep = Sweep(config, overrides, recipe, block, stage, "")
    for key, values in block.ranges.items():
        for value in values.ends:
            try:
                check_model(sweep.with_values({key: value}))
            except RequestError as error:
                problem = str(error).removeprefix("--set: ")
                raise RequestError(f"{config}: `sweep.ranges.{key}` has the value {value}: {problem}") from error
    pinned, inputs = preflight(recipe)
    # More trials or repeats continue the sweep.
    shared = {
        "recipe": pinned.model_dump(mode="json"),
        "sweep": block.model_dump(mode="json", exclude={"trials", "repeats"}),
        "inputs": inputs.model_dump(mode="json", exclude={"code", "recipes"}),
    }
    sweep = Sweep(config, overrides, recipe, block, stage, f"{recipe.name}-{recipe_hash(shared)}")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    prepare_zenml()
    from tools import results
    from tools.zenml_store import forget_lost

    results.repair_killed()
    forget_lost()
    return sweep


def run_trials(sweep: Sweep) -> None:
    """Run trials until there are as many as the recipe says."""
    import optuna

    from llm_engineering.training.trainer.trial import STOPPED

    while True:
        trial = next_trial(sweep)
        if trial is None:
            return
        logger.info("Trial %d: %s", trial.number + 1, _shown(trial.params))
        try:
            loss = _train(sweep, trial.params, trial.user_attrs[RUN], trial_id=trial._trial_id)
        except (RequestError, WorkError) as error:
            stopped = STOPPED in sweep.study.get_trials(deepcopy=False)[trial.number].user_attrs
            trial.set_user_attr(REASON, str(error))
            sweep.study.tell(trial, state=optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.FAIL)
            logger.info("Trial %d %s: %s", trial.number + 1, "was stopped" if stopped else "failed", error)
        else:
            sweep.study.tell(trial, loss)
            logger.info("Trial %d: validation loss %.4f", trial.number + 1, loss)


def next_trial(sweep: Sweep) -> optuna.Trial | None:
    """Begin the next trial; None if there are enough. Trials of killed processes are run again with the same values."""
    import numpy as np
    import optuna

    from tools.results import is_running, this_process

    study, states = sweep.study, optuna.trial.TrialState
    with _lock(sweep.folder / "trials.lock"):
        for begun in study.get_trials(states=[states.RUNNING]):
            if is_running(begun.user_attrs):
                continue
            study.set_user_attr(KILLED, [*study.user_attrs.get(KILLED, []), begun.number])
            study.tell(begun.number, state=states.FAIL)
            study.enqueue_trial(begun.params)
            logger.info("Trial %d was killed, and is run again", begun.number + 1)
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
    from tools.readiness import preflight
    from tools.run import start

    recipe, inputs = preflight(sweep.with_values(values))
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
    loss = validation_loss(json.loads((report.load().path / "report.json").read_text(encoding="utf-8")))
    if not math.isfinite(loss):
        raise WorkError(
            f"The validation loss of {sweep.stage} is {loss}. Lower the highest learning rate of the ranges."
        )
    return loss


def _run_workers(sweep: Sweep, jobs: int) -> None:
    """Run trials in several processes, each with its share of the cards."""
    import torch

    from llm_engineering.training.processes.launch import run_processes
    from llm_engineering.training.processes.ranks import LAUNCHER

    cards = [str(card) for card in range(torch.cuda.device_count())]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        cards = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    share, needed = len(cards) // jobs, sweep.recipe.compute.num_processes
    if torch.cuda.is_available() and share < needed:
        raise RequestError(
            f"--jobs {jobs} needs {jobs * needed} cards, {needed} for each trial, and this machine has {len(cards)}. Use "
            f"--jobs {max(1, len(cards) // needed)}."
        )
    environments = [
        os.environ
        | {WORKER: str(job), LAUNCHER: str(os.getpid())}
        | ({"CUDA_VISIBLE_DEVICES": ",".join(cards[job * share : (job + 1) * share])} if share else {})
        | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))}
        for job in range(jobs)
    ]
    # Made once, before several processes open it.
    assert sweep.study is not None
    sets = [argument for override in sweep.overrides for argument in ("--set", override)]
    ended = run_processes([sys.executable, "-m", "tools.cli", "sweep", "--config", sweep.config, *sets], environments)
    if ended.received is not None or INTERRUPTED in ended.codes:
        raise KeyboardInterrupt
    if any(ended.codes):
        raise WorkError(
            f"The processes of the sweep ended with the exit codes {', '.join(map(str, ended.codes))}; their errors are in the "
            "log above. The same command continues the sweep."
        )


def _evaluate(sweep: Sweep, winner: optuna.trial.FrozenTrial, started: float) -> RunResult:
    """Run the winner's recipe like any other. Its training comes from the cache, and the test split is read only now."""
    from tools import results
    from tools.readiness import preflight
    from tools.run import launch

    recipe, inputs = preflight(sweep.with_values(winner.params))
    logger.info("Evaluating trial %d", winner.number + 1)
    return results.collect(launch(sweep.stage, recipe, inputs, cache=True), time.monotonic() - started)


def _report(sweep: Sweep, winner: optuna.trial.FrozenTrial, repeats: list[float], run: RunResult) -> dict[str, Any]:
    """The report of the sweep as JSON. Trials are numbered from 1."""
    import optuna

    from llm_engineering.evaluation.selection import by_chance

    states = {
        optuna.trial.TrialState.COMPLETE: "complete",
        optuna.trial.TrialState.PRUNED: "stopped",
        optuna.trial.TrialState.FAIL: "failed",
    }
    trials = [
        {
            "number": trial.number + 1,
            "state": states[trial.state],
            "values": trial.params,
            "loss": trial.value if trial.state == optuna.trial.TrialState.COMPLETE else None,
            "curve": [[step / 1000, loss] for step, loss in sorted(trial.intermediate_values.items())],
            "reason": trial.user_attrs.get(REASON, ""),
            "run": trial.user_attrs[RUN],
        }
        for trial in counted(sweep.study)
    ]
    counts = {state: sum(trial["state"] == state for trial in trials) for state in states.values()}
    own = {key: _value(sweep.recipe, key) for key in sweep.block.ranges}
    return {
        "sweep": sweep.name,
        "stage": sweep.stage,
        "ranges": sweep.block.model_dump(mode="json", exclude_defaults=True)["ranges"],
        "own": {"values": own, "loss": next((trial["loss"] for trial in trials if trial["values"] == own), None)},
        "counts": counts,
        "winner": {"number": winner.number + 1, "values": winner.params, "loss": winner.value},
        "repeats": repeats,
        "chance": by_chance(counts["complete"] + counts["stopped"], repeats),
        "command": [PROGRAM, "run", sweep.stage, "--config", sweep.config]
        + [argument for value in sweep.sets(winner.params) for argument in ("--set", value)],
        "trials": trials,
        "evaluation": run.evaluation,
        "gate": run.promotion["reason"],
        "pages": run.pages,
        "version": f"{run.model} version {run.model_version}",
    }


def _write_page(folder: Path, report: dict[str, Any]) -> None:
    from llm_engineering.reports.page import write_report
    from llm_engineering.reports.sweep_report import sweep_page

    write_report(folder, report, sweep_page(report))


def _print(report: dict[str, Any], run: RunResult, file: Any) -> None:
    """Print the winner's run as every run, then the trials, and what their best shows."""
    from llm_engineering.reports.sweep_report import sentences
    from tools.results import print_table

    print_table(run, file)
    console = Console(file=file, width=None if file.isatty() else 120, highlight=False, markup=False)
    keys = list(report["ranges"])
    table = Table("Trial", *keys, "Validation loss", "State", title="Trials, the best first", title_justify="left")
    for trial in sorted(report["trials"], key=lambda trial: (trial["loss"] is None, trial["loss"])):
        loss = f"{trial['loss']:.4f}" if trial["loss"] is not None else ""
        table.add_row(str(trial["number"]), *(_number(trial["values"].get(key)) for key in keys), loss, trial["state"])
    console.print(table)
    for sentence in sentences(report):
        console.print(sentence)


def _distribution(values: Range) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices is not None:
        return CategoricalDistribution(values.choices)
    assert values.low is not None
    assert values.high is not None
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
    return FloatDistribution(values.low, values.high, values.log, values.step)


def _value(recipe: Recipe, key: str) -> Any:
    """The recipe's own value of a key; None for a field of a library that the recipe does not set."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in values.items())


@contextmanager
def _lock(file: Path, refused: str = "") -> Iterator[None]:
    """Hold a file's lock, which ends with this process.

    Args:
        refused: the message if another process holds it; empty to wait for it.

    Raises:
        RequestError: another process holds the lock.
    """
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if refused else 0))
        except BlockingIOError:
            raise RequestError(refused) from None
        yield
