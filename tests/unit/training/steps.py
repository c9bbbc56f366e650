"""Interrupts a training run at a chosen step."""

import os
import signal

import pytest

from llm_engineering.training.telemetry import work


def during_step(monkeypatch, step, action):
    """Call `action` at the end of a step, before the project's own callback."""
    real = work.TelemetryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(work.TelemetryCallback, "on_step_end", on_step_end)


def interrupt(step, run, number=signal.SIGTERM):
    """Call `run`, a training that gets a signal at the end of a step, and so stops with a checkpoint of this step."""
    with pytest.MonkeyPatch.context() as patch:
        during_step(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt, match=f"{number.name} in step {step}"):
            run()


def break_off(step, run):
    """Call `run`, a training that fails at the end of a step, without a checkpoint of this step."""

    def fail():
        raise RuntimeError("the power went out")

    with pytest.MonkeyPatch.context() as patch:
        during_step(patch, step, fail)
        with pytest.raises(RuntimeError, match="power"):
            run()
