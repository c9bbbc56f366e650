"""Tells whether the process that started a run is still there, and repairs runs whose process is gone."""

from __future__ import annotations

import logging
import os
import socket
from datetime import UTC, datetime
from typing import Any

import psutil
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse, PipelineRunUpdate, StepRunUpdate
from zenml.models.v2.misc.exception_info import ExceptionInfo

logger = logging.getLogger("llm_engineering.run")

KILLED = "killed"
_PROCESS = "process"
# The start of a process is told in ticks since the boot, and the boot to a second.
_START_TOLERANCE_S = 2.0


def this_process() -> dict[str, Any]:
    """What a run is started with as ZenML's `extra`. A number alone is given again to other processes."""
    return {_PROCESS: {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}}


def is_alive(run: PipelineRunResponse) -> bool | None:
    """Whether the process that started a run still runs; None where this machine cannot tell."""
    process = run.config.extra.get(_PROCESS)
    if process is None or process["host"] != socket.gethostname():
        return None
    try:
        found = psutil.Process(process["pid"])
        started = abs(found.create_time() - process["started"]) <= _START_TOLERANCE_S
        return started and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def repair_killed() -> None:
    """Mark runs as failed whose process was killed: nobody was left to do it."""
    store = Client().zen_store
    for status in (ExecutionStatus.RUNNING, ExecutionStatus.INITIALIZING, ExecutionStatus.PROVISIONING):
        for run in Client().list_pipeline_runs(status=status, size=1000, hydrate=True).items:
            if is_alive(run) is not False:
                continue
            process = run.config.extra[_PROCESS]
            reason = f"{KILLED}: process {process['pid']} on {process['host']} ended without a word"
            steps = Client().list_run_steps(pipeline_run_id=run.id, size=1000).items
            for step in steps:
                if not step.status.is_finished:
                    failed = StepRunUpdate(
                        status=ExecutionStatus.FAILED,
                        end_time=datetime.now(UTC).replace(tzinfo=None),
                        exception_info=ExceptionInfo(traceback=reason, message=reason),
                    )
                    store.update_run_step(step.id, failed)
            store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.FAILED, status_reason=reason))
            logger.info("Run %s was killed. --resume %s goes on with it.", run.name, run.name)
