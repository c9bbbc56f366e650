"""The command `sweep`: trains a stage with many values of the recipe's keys, and evaluates the best of them once."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.recipe.loading import check_name, load_recipe, recipe_hash
from tools.cli import DEFAULT_RECIPE, PROGRAM, Config, Json, Overrides, prepare_zenml
from tools.sweeps.trials import REASON, WORKER, Sweep, counted, repeat, run_trials
from tools.terminal import console

if TYPE_CHECKING:
    import optuna

    from tools.results import RunResult

logger = logging.getLogger("llm_engineering.sweep")


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
    from llm_engineering.training.processes.ranks import run_lock

    with run_lock(found.folder):
        if jobs == 1:
            run_trials(found)
        else:
            _run_workers(found, jobs)
        started = time.monotonic()
        winner = found.winner()
        repeats = repeat(found, winner)
        run = _evaluate(found, winner, started)
    from llm_engineering.reports.page import write_report
    from llm_engineering.reports.sweep_report import sweep_page

    report = _report(found, winner, repeats, run)
    write_report(found.folder, report, sweep_page(report))
    _print(report, run, sys.stderr if as_json else sys.stdout)
    logger.info("The sweep: %s", found.folder / "report.html")
    if as_json:
        shown = ("sweep", "stage", "counts", "winner", "chance")
        print(json.dumps({name: report[name] for name in shown} | {"run": run.as_json()}))
    return 0


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
    if full.compute.target != "local":
        raise RequestError(
            f"A sweep trains on this machine, and compute.target is {full.compute.target}. Use --set compute.target=local, and start "
            "the command on the machine with the cards."
        )
    block, stage = full.sweep, full.sweep.stage_of(full.chain)
    recipe = load_recipe(config, (*overrides, "sweep=null"))
    # The imports are slow, so they come after the recipe has been checked.
    from tools.readiness import check_and_pin
    from tools.recipe_checks import check_model

    sweep = Sweep(config, overrides, recipe, block, stage, "")
    for key, values in block.ranges.items():
        for value in values.ends:
            try:
                check_model(sweep.with_values({key: value}))
            except RequestError as error:
                problem = str(error).removeprefix("--set: ")
                raise RequestError(f"{config}: `sweep.ranges.{key}` has the value {value}: {problem}") from error
    pinned, inputs = check_and_pin(recipe)
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
    from tools.readiness import check_and_pin
    from tools.run import launch

    recipe, inputs = check_and_pin(sweep.with_values(winner.params))
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
        }
        for trial in counted(sweep.study)
    ]
    counts = {state: sum(trial["state"] == state for trial in trials) for state in states.values()}
    return {
        "sweep": sweep.name,
        "stage": sweep.stage,
        "ranges": sweep.block.model_dump(mode="json", exclude_defaults=True)["ranges"],
        "own": {"values": sweep.own, "loss": next((t["loss"] for t in trials if t["values"] == sweep.own), None)},
        "counts": counts,
        "winner": {"number": winner.number + 1, "values": winner.params, "loss": winner.value},
        "repeats": repeats,
        "chance": by_chance(counts["complete"] + counts["stopped"], repeats),
        "command": [PROGRAM, "run", sweep.stage, "--config", sweep.config]
        + [
            argument
            for value in sweep.sets(winner.params)
            if not value.startswith(("sweep.", "sweep="))
            for argument in ("--set", value)
        ],
        "trials": trials,
        "evaluation": run.evaluation,
        "gate": run.promotion["reason"],
        "pages": run.pages,
        "version": f"{run.model} version {run.model_version}",
    }


def _print(report: dict[str, Any], run: RunResult, file: Any) -> None:
    """Print the winner's run as every run, then the trials, and what their best shows."""
    from llm_engineering.reports.sweep_report import sentences, shown_value
    from tools.results import print_table

    print_table(run, file)
    shown = console(file)
    keys = list(report["ranges"])
    table = Table("Trial", *keys, "Validation loss", "State", title="Trials, the best first", title_justify="left")
    for trial in sorted(report["trials"], key=lambda trial: (trial["loss"] is None, trial["loss"])):
        loss = f"{trial['loss']:.4f}" if trial["loss"] is not None else ""
        table.add_row(
            str(trial["number"]), *(shown_value(trial["values"].get(key)) for key in keys), loss, trial["state"]
        )
    shown.print(table)
    for sentence in sentences(report):
        shown.print(sentence)
