"""Logs metadata that the dashboard and the model registry show."""

from typing import Any

from zenml import log_metadata

from llm_engineering.data.ledger import Ledger


def log_rows(artifact: str, ledger: Ledger, stage: str, **facts: Any) -> None:
    """Log the numbers of read, kept and quarantined rows of a stage, and further facts, on an output artifact."""
    log_artifact(
        artifact,
        read=ledger.read[stage],
        rows=ledger.kept[stage],
        quarantined=sum(reasons.total() for reasons in ledger.reasons.values()),
        **facts,
    )


def log_artifact(artifact: str, **facts: Any) -> None:
    """Log facts on an output artifact of the running step."""
    log_metadata(metadata=facts, artifact_name=artifact, infer_artifact=True)
