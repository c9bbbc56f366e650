"""Logs metadata that the dashboard and the model registry show."""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from zenml import get_step_context, log_metadata

from llm_engineering.data.ledger import Ledger
from llm_engineering.recipe.loading import recipe_hash

# The facts of a step that runs in a job, by artifact; the run logs them later. None in a run.
collected: dict[str, dict[str, Any]] | None = None


def log_rows(artifact: str, ledger: Ledger, stage: str, **facts: Any) -> None:
    """Log the numbers of read, kept and quarantined rows of a stage, and further facts, on an output artifact."""
    log_artifact(
        artifact,
        read=ledger.read[stage],
        rows=ledger.kept[stage],
        quarantined=ledger.reasons.get(stage, Counter()).total(),
        **facts,
    )


def log_artifact(artifact: str, **facts: Any) -> None:
    """Log facts on an output artifact of the running step."""
    if collected is not None:
        collected[artifact] = facts
    else:
        log_metadata(metadata=facts, artifact_name=artifact, infer_artifact=True)


def page_facts(base_model: str) -> dict[str, str]:
    """What the head of a report's page says about the run that writes the page.

    A step that comes from the cache keeps its page, which names the earlier run that wrote it.
    """
    context = get_step_context()
    run = context.pipeline_run
    # As a dict: the class of the recipe would add the code of all stages to the cache key of each.
    recipe = (run.config.parameters or {})["recipe"]
    return {
        "Model": recipe["name"],
        # A trial of a sweep makes no version.
        "Version": str(context.model.number) if run.config.model is not None else "",
        "Run": run.name,
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "Recipe": f"{recipe['name']} {recipe_hash(recipe)}",
        "Base model": base_model,
    }
