"""Interrupts a training run at a chosen step."""

from llm_engineering.training.telemetry import work


def during_step(monkeypatch, step, action):
    """Call `action` at the end of a step, before the project's own callback."""
    real = work.TelemetryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(work.TelemetryCallback, "on_step_end", on_step_end)
