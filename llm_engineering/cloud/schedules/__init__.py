"""Retraining at fixed times: EventBridge Scheduler, systemd timers, crontab."""
