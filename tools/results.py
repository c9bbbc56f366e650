"""Results of runs: the tables at the end of a run, the list of the last runs, and the repair of killed runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from pydantic import BaseModel
from rich.table import Table

from llm_engineering.process import PROCESS, is_running
from llm_engineering.recipe.evaluation_blocks import MIN_QUESTIONS
from tools.cli import prepare_zenml
from tools.terminal import console, titled_table

if TYPE_CHECKING:
    from zenml.models import ArtifactVersionResponse, PipelineRunResponse

logger = logging.getLogger("llm_engineering.run")

KILLED = "killed"


def runs(limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of runs.")] = 10) -> int:
    """List the last runs.

    A run whose process was killed is first marked as failed.

    Example: `llm-engineering runs --limit 3`
    """
    from zenml.client import Client

    prepare_zenml()
    from pipelines.repeats import version_of

    repair_killed()
    runs = Client().list_pipeline_runs(sort_by="desc:created", size=limit, hydrate=True).items
    if not runs:
        print("There are no runs yet. Start the first one: `make run-sft`.")
        return 0
    table = Table("Run", "Pipeline", "State", "Started (UTC)", "Seconds", "Model", "Id")
    for run in runs:
        killed = (run.get_body().status_reason or "").startswith(KILLED)
        # The end of a killed run is unknown.
        seconds = (
            f"{(run.end_time - run.start_time).total_seconds():.0f}"
            if run.end_time and run.start_time and not killed
            else ""
        )
        version = version_of(run)
        table.add_row(
            run.name,
            run.pipeline.name if run.pipeline else "",
            f"{run.status} ({KILLED})" if killed else str(run.status),
            f"{run.start_time:%Y-%m-%d %H:%M}" if run.start_time else "",
            seconds,
            f"{version.model.name} {version.number} {version.stage or ''}".strip() if version else "",
            str(run.id),
        )
    console(width=200).print(table)
    return 0


class StepLine(BaseModel):
    """A step of a run, with its final state."""

    pipeline: str
    name: str
    status: str
    seconds: float


class RunResult(BaseModel):
    """Everything that the tables of a run show.

    Attributes:
        pages: the file of each report, for a browser, by the report's name.
        model_version: the number of the model's version; None if there is none.
        repeats: whether that version is of an earlier run, because this run made no new model.
    """

    run_id: str
    run_name: str
    status: str
    pipeline: str
    steps: list[StepLine]
    artifacts: dict[str, dict[str, str]]
    metrics: dict[str, float]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    promotion: dict[str, Any]
    comet: dict[str, str]
    trackers: dict[str, dict[str, str]]
    pages: dict[str, str]
    duration_s: float
    model: str = ""
    model_version: int | None = None
    repeats: bool = False

    def as_json(self) -> dict[str, Any]:
        """The JSON object that `--json` prints. Its keys are part of the public interface."""
        names = {
            "run_id",
            "status",
            "pipeline",
            "artifacts",
            "metrics",
            "comet",
            "trackers",
            "duration_s",
            "model_version",
        }
        return self.model_dump(include=names)


def collect(runs: Sequence[PipelineRunResponse], duration_s: float) -> RunResult:
    """Collect steps, artifacts and reports of the runs. Of two artifacts with the same name, the later one counts."""
    from zenml.enums import ExecutionStatus

    from pipelines.repeats import version_of

    artifacts: dict[str, ArtifactVersionResponse] = {}
    steps: list[StepLine] = []
    reports: dict[str, Any] = {"data": {}, "training": {}}
    pages: dict[str, str] = {}
    costs: list[Any] = []
    for run in runs:
        pipeline = run.pipeline.name if run.pipeline else "unknown"
        for name, step in sorted(run.steps.items(), key=lambda item: str(item[1].start_time)):
            cached = step.status == ExecutionStatus.CACHED
            seconds = (step.end_time - step.start_time).total_seconds() if step.end_time and step.start_time else 0.0
            line = StepLine(pipeline=pipeline, name=name, status=str(step.status), seconds=0.0 if cached else seconds)
            steps.append(line)
            if not cached and "sagemaker_name" in step.run_metadata:
                costs.append(step.run_metadata.get("sagemaker_cost_usd_estimate"))
            for versions in step.outputs.values():
                for version in versions:
                    artifacts[version.artifact.name] = version
                    if version.artifact.name == "data_report":
                        report = version.load().report()
                        reports["data"][report["kind"]] = report
                        pages[f"data report, {report['kind']} rows"] = _page(version)
                    elif version.artifact.name == "training_report":
                        report = version.load().report()
                        reports["training"][report["stage"]] = report
                        pages[f"training report, {report['stage']}"] = _page(version)
    evaluation: dict[str, Any] = {}
    if "evaluation_report" in artifacts:
        evaluation = artifacts["evaluation_report"].load().report()
    if "evaluation_page" in artifacts:
        pages["evaluation report"] = _page(artifacts["evaluation_page"])
    decision = artifacts["promotion_decision"].load().model_dump() if "promotion_decision" in artifacts else {}
    training = reports["training"]
    # The reports are in the order in which the stages were trained.
    newest: dict[str, Any] = next(reversed(training.values()), {})
    metrics = dict(evaluation.get("metrics", {}))
    if newest:
        metrics["tokens_per_second"] = newest["tokens_per_second"]
    if costs and None not in costs:
        metrics["sagemaker_cost_usd"] = round(sum(costs), 4)
    last = runs[-1]
    model = version_of(last)
    return RunResult(
        run_id=str(last.id),
        run_name=last.name,
        status=str(last.status),
        pipeline=last.pipeline.name if last.pipeline else "unknown",
        steps=steps,
        artifacts={name: {"version": str(v.version), "uri": v.uri} for name, v in sorted(artifacts.items())},
        metrics=metrics,
        data=reports["data"],
        evaluation=evaluation,
        promotion=decision,
        comet=newest.get("comet", {}),
        trackers=newest.get("trackers", {}),
        pages=pages,
        duration_s=round(duration_s, 1),
        model=model.model.name if model else "",
        model_version=model.number if model else None,
        repeats=model is not None and last.model_version is None,
    )


def print_table(result: RunResult, file: TextIO) -> None:
    """Print the steps, the rows, the measures, an answer of each model, and the places of the results."""
    shown = console(file)
    ran = titled_table("What ran", "Step", "State", "Seconds")
    for step in result.steps:
        ran.add_row(f"{step.pipeline}: {step.name}", step.status, f"{step.seconds:.0f}")
    shown.print(ran)
    if result.data:
        rows = titled_table("Rows", "Stage", "Read", "Kept", "Set aside")
        printed: set[str] = set()
        for kind, report in result.data.items():
            for stage, counts in report["stages"].items():
                # Reports begin with the stages that they share, and an earlier report has already shown these.
                if stage in printed:
                    continue
                printed.add(stage)
                reasons = ", ".join(f"{reason} {count}" for reason, count in counts["quarantined"].items())
                rows.add_row(stage, str(counts["read"]), str(counts["kept"]), reasons or "none")
            used = ", ".join(f"{name} {count}" for name, count in report["rows"].items())
            if report.get("truncated"):
                used += f"; {report['truncated']} truncated ({report['share_truncated']:.1%})"
            rows.add_row(f"{kind} rows used", "", str(sum(report["rows"].values())), used)
        shown.print(rows)
        asked = result.data.get("instruction", {}).get("stages", {}).get("exam")
        if asked is not None and not asked["kept"]:
            shown.print(_no_exam(asked))
    if result.evaluation:
        shown.print(_measures(result.evaluation))
    exam = result.evaluation.get("exam")
    if exam is not None and exam["drawn"]:
        shown.print(exam_table(exam, result.evaluation["newest"], result.evaluation["seed"]))
    for sample in result.evaluation.get("samples", [])[:1] if exam is None or not exam["drawn"] else []:
        answers = titled_table("One held-out question", "Model", "Answer")
        answers.add_row("question", sample["prompt"])
        for name, answer in sample["answers"].items():
            answers.add_row(name, answer["text"] + ("" if answer["stopped"] else " … [not ended]"))
        answers.add_row("reference", sample["reference"])
        shown.print(answers)
    if result.promotion:
        gate = titled_table(
            "Promotion", "Rule", "Better by", f"{result.promotion['confidence']:.0%} interval", "Verdict"
        )
        for rule in result.promotion["rules"]:
            judged = rule["value"] is not None
            verdict = rule["verdict"].upper() if rule["verdict"] == "failed" else rule["verdict"]
            gate.add_row(
                rule["name"],
                f"{rule['value']:.4f}" if judged else "",
                f"{rule['low']:.4f} to {rule['high']:.4f}" if judged else "",
                f"{verdict}: {rule['reason']}" if rule["reason"] else verdict,
            )
        shown.print(gate)
        shown.print(result.promotion["reason"])
    if result.repeats:
        shown.print(
            f"No new version: {result.model} version {result.model_version} has this model already, and the run belongs to it."
        )
    places = dict(result.pages)
    # The model of the last stage; `--json` has the places of all artifacts.
    trained = [name for name in result.artifacts if name.endswith("_adapter")]
    newest = f"{result.evaluation['newest']}_adapter" if result.evaluation else trained[-1] if trained else ""
    if newest in result.artifacts:
        places[f"{newest} v{result.artifacts[newest]['version']}"] = result.artifacts[newest]["uri"]
    places |= {f"Comet {name}": place for name, place in result.comet.items()}
    for tracker, found in result.trackers.items():
        places |= {f"{tracker} {name}": place for name, place in found.items()}
    speed = (
        f", training {result.metrics['tokens_per_second']:.0f} tokens/s"
        if "tokens_per_second" in result.metrics
        else ""
    )
    cost = (
        f", jobs about {result.metrics['sagemaker_cost_usd']:.2f} USD" if "sagemaker_cost_usd" in result.metrics else ""
    )
    places["run"] = f"{result.run_name} ({result.status}, {result.duration_s:.0f} s{speed}{cost})"
    places["dashboard"] = "make dashboard"
    # Lines and no table: a table would break a path into pieces, which cannot be copied or clicked on.
    shown.print("Where", style="bold")
    width = max(map(len, places))
    for name, place in places.items():
        shown.print(f"  {name:<{width}}  {place}", soft_wrap=True)


def _no_exam(asked: dict[str, Any]) -> str:
    """Why no model was asked about the documents, and what to do."""
    left = asked["quarantined"].get("too_few_questions", 0)
    return (
        f"No exam: of {asked['read']} questions about the documents {left} are usable, and an exam needs {MIN_QUESTIONS}. So rules "
        "about the exam fail, and no model is promoted by them. State more facts, each in several sentences, or write your own "
        "questions, and name their file as exam.path."
    )


def exam_table(exam: dict[str, Any], newest: str, seed: int) -> Table:
    """The drawn questions of an exam, with each model's answer marked right or wrong."""
    from llm_engineering.reports.exam_report import drawn_title, shown_answer

    table = titled_table(drawn_title(exam, newest, seed), "Model", "Answer")
    for row in (exam["rows"][index] for index in exam["drawn"]):
        table.add_row("question", row["question"])
        table.add_row("right answer", " / ".join(row["accepted"]) or "(none: the documents do not say)")
        for name, answer in row["answers"].items():
            table.add_row(name, shown_answer(answer))
        table.add_section()
    return table


def _measures(evaluation: dict[str, Any]) -> Table:
    """Every measure of every model, and the difference of newest model and base model with its interval."""
    from llm_engineering.evaluation.statistics import verdict
    from llm_engineering.reports.page import estimated

    models, newest = evaluation["models"], evaluation["newest"]
    # The exam is also taken with retrieval.
    taken = (evaluation.get("exam") or {}).get("models", [])
    models = [*models, *(name for name in taken if name not in models)]
    measures = titled_table("Held-out measures", "Measure", *models, f"{newest} minus base", "Verdict")
    for found in evaluation["measures"].values():
        values = [f"{found['models'][name]['value']:.4g}" if name in found["models"] else "" for name in models]
        difference = found["differences"][f"{newest}-base"]
        shown = estimated(difference, sign=True)
        measures.add_row(found["title"], *values, shown, verdict(difference, found["better"]))
    return measures


def _page(version: ArtifactVersionResponse) -> str:
    """The path of a report's page, or the address of its folder if the store is not on this machine."""
    page = version.load().path / "report.html"
    return str(page) if page.is_relative_to(version.uri) else version.uri


def is_alive(run: PipelineRunResponse) -> bool | None:
    """Whether the process that started a run still runs; None if it is not recorded, or on another host."""
    return is_running(run.config.extra)


def unfinished() -> list[PipelineRunResponse]:
    """The runs that have not ended, as far as ZenML knows."""
    from zenml.client import Client
    from zenml.enums import ExecutionStatus

    states = (ExecutionStatus.RUNNING, ExecutionStatus.INITIALIZING, ExecutionStatus.PROVISIONING)
    return [
        run for status in states for run in Client().list_pipeline_runs(status=status, size=1000, hydrate=True).items
    ]


def repair_killed() -> None:
    """Mark runs as failed if their process was killed before it could do so."""
    from zenml.client import Client
    from zenml.enums import ExecutionStatus
    from zenml.models import PipelineRunUpdate, StepRunUpdate
    from zenml.models.v2.misc.exception_info import ExceptionInfo

    from pipelines.repeats import drop_repeated_version
    from tools.zenml_store import remove_unregistered

    store = Client().zen_store
    for run in unfinished():
        if is_alive(run) is not False:
            continue
        process = run.config.extra[PROCESS]
        reason = f"{KILLED}: process {process['pid']} on {process['host']} ended without reporting a result"
        steps = Client().list_run_steps(pipeline_run_id=run.id, size=1000).items
        for step in steps:
            if not step.status.is_finished:
                remove_unregistered(step)
                failed = StepRunUpdate(
                    status=ExecutionStatus.FAILED,
                    end_time=datetime.now(UTC).replace(tzinfo=None),
                    exception_info=ExceptionInfo(traceback=reason, message=reason),
                )
                store.update_run_step(step.id, failed)
        store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.FAILED, status_reason=reason))
        drop_repeated_version(run)
        logger.info("Run %s was killed. Continue it with --resume %s.", run.name, run.name)
