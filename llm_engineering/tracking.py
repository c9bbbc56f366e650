"""Comet ML, online or offline. Nothing that happens here can fail a training run: it is said, and training goes on."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_engineering.config import TrackingConfig
from llm_engineering.settings import Settings

logger = logging.getLogger(__name__)


class CometRun:
    """One Comet experiment, or none.

    Attributes:
        key: the experiment's key; None without an experiment.
        url: where to see it, when online.
        archive: the zip that `comet upload` sends later, when offline; it exists after `end`.
    """

    def __init__(self) -> None:
        self.experiment: Any = None
        self.key: str | None = None
        self.url: str | None = None
        self.archive: Path | None = None

    @classmethod
    def start(cls, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str]) -> CometRun:
        """Start an experiment: online with a key in the settings, offline without one or if Comet cannot be reached."""
        run = cls()
        if config.comet == "off":
            logger.info("Comet: off, as the recipe says (tracking.comet)")
            return run
        if config.comet == "auto" and settings.comet_api_key is not None:
            run._guard("start", lambda: run._open(config, settings, name, tags, online=True))
            if run.experiment is None:
                logger.warning("Comet: going on offline, so that no metric is lost")
        if run.experiment is None:
            run._guard("start", lambda: run._open(config, settings, name, tags, online=False))
        return run

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self._guard("log_parameters", lambda: self.experiment.log_parameters(dict(parameters)))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log the numbers among `metrics` at a step."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._guard("log_metrics", lambda: self.experiment.log_metrics(numbers, step=step))

    def end(self) -> dict[str, str]:
        """Close the experiment: its `key`, and its `url` or `archive`; empty without an experiment."""
        self._guard("end", lambda: self.experiment.end())
        if self.key is None:
            return {}
        place = {"url": self.url} if self.url else {"archive": str(self.archive)}
        return {"key": self.key, **{name: text for name, text in place.items() if text}}

    def _open(self, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str], online: bool) -> None:
        # Its error tracker would call home, and retry without a network.
        os.environ.setdefault("COMET_ERROR_TRACKING_ENABLE", "0")
        # It would patch the frameworks, and asks to be imported before them; we log what we mean to log.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.WARNING)
        archives = (settings.llm_output_dir / "comet").resolve()
        archives.mkdir(parents=True, exist_ok=True)
        key = settings.comet_api_key.get_secret_value() if online and settings.comet_api_key else None
        experiment = comet_ml.start(
            api_key=key,
            workspace=config.workspace,
            project_name=config.project_name,
            online=online,
            mode="create",
            experiment_config=comet_ml.ExperimentConfig(
                name=name,
                tags=list(tags),
                offline_directory=None if online else str(archives),
                # What we do not ask for can hold secrets: source, uncommitted changes, output, command line, host.
                log_code=False,
                log_git_metadata=False,
                log_git_patch=False,
                log_env_details=False,
                parse_args=False,
                auto_output_logging=False,  # type: ignore[arg-type]
                auto_param_logging=False,
                auto_metric_logging=False,
                display_summary_level=0,
            ),
        )
        self.experiment, self.key = experiment, experiment.get_key()
        if online:
            self.url = experiment.url
            logger.info("Comet: %s", self.url)
        else:
            self.archive = archives / f"{self.key}.zip"
            logger.info("Comet: offline, the archive will be %s (`comet upload` sends it)", self.archive)

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        if what != "start" and self.experiment is None:
            return
        try:
            action()
        except Exception as error:  # Comet raises its own and its transport's errors; none may end a training run.
            logger.warning("Comet: %s failed (%s: %s); training goes on", what, type(error).__name__, error)
