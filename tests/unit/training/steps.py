"""Does something in the middle of a training run."""

from llm_engineering.training import telemetry


def during_step(monkeypatch, step, action):
    """Do something at the end of a step, before what the project does there."""
    real = telemetry.TelemetryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(telemetry.TelemetryCallback, "on_step_end", on_step_end)
