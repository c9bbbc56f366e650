"""Sends metrics to Comet ML, TensorBoard and Weights & Biases.

If one of them fails, the error is logged and training continues.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrackingConfig

logger = logging.getLogger(__name__)

# Seconds that Comet has to answer before metrics are stored offline.
PROBE_S = 5.0


def check_trackers(config: TrackingConfig) -> None:
    """Raise a RequestError if the recipe reports to a package that is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise RequestError(
                f"tracking.report_to names {name}, which is not installed. Install it "
                f"(pip install 'llm-engineering[{name}]'), or remove it from the list."
            )


class Trackers:
    """All trackers of one run.

    Comet is always one of them; `tracking.comet` sets how it is used. TensorBoard and Weights & Biases are used if
    `tracking.report_to` names them.
    """

    def __init__(self, runs: Mapping[str, CometRun | TensorBoardRun | WandbRun]) -> None:
        self.runs = runs

    @classmethod
    def start(cls, config: TrackingConfig, settings: Settings, folder: Path, tags: Sequence[str]) -> Trackers:
        """Start a run in each tracker, named after `folder`, the folder of the training run.

        Raises:
            RequestError: a package is not installed.
        """
        check_trackers(config)
        runs: dict[str, CometRun | TensorBoardRun | WandbRun] = {
            "comet": CometRun.start(config, settings, folder.name, tags)
        }
        if "tensorboard" in config.report_to:
            runs["tensorboard"] = TensorBoardRun(folder / "tensorboard")
        if "wandb" in config.report_to:
            runs["wandb"] = WandbRun(config, settings, folder.name, tags)
        return cls(runs)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters and versions."""
        for run in self.runs.values():
            run.log_parameters(parameters)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log the finite numbers among `metrics` at a step."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        for run in self.runs.values():
            run.log_metrics(numbers, step)

    def end(self) -> dict[str, dict[str, str]]:
        """Close all trackers; returns where each run can be seen, by the tracker's name."""
        return {name: run.end() for name, run in self.runs.items()}


def _guarded(service: str, operation: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # Trackers raise many kinds of errors, and no tracker may end a training run.
        logger.warning("%s: %s failed (%s: %s); training continues", service, operation, type(error).__name__, error)


def _check_reachable(address: str) -> None:
    """Raise an OSError if a server does not answer in some seconds.

    Without a connection, `comet_ml.start` returns an experiment that loses all metrics, after up to four minutes.
    """
    try:
        urllib.request.urlopen(address, timeout=PROBE_S).close()  # noqa: S310 — Comet's own address
    except urllib.error.HTTPError:
        # The server answers, and that is enough.
        return


class CometRun:
    """One Comet experiment; without one (`tracking.comet: off`, or Comet failed) the methods do nothing.

    Attributes:
        key: the experiment's key; None without an experiment.
        url: the experiment's page, if it is online.
        archive: the zip file of an offline experiment, which `comet upload` sends later. It exists after `end`.
    """

    def __init__(self) -> None:
        self.experiment: Any = None
        self.key: str | None = None
        self.url: str | None = None
        self.archive: Path | None = None

    @classmethod
    def start(cls, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str]) -> CometRun:
        """Start an experiment: online if the settings have a key and Comet can be reached, otherwise offline."""
        run = cls()
        if config.comet == "off":
            logger.info("Comet: switched off by the recipe (tracking.comet)")
            return run
        if config.comet == "auto" and settings.comet_api_key is not None:
            run._guard("start", lambda: run._open(config, settings, name, tags, online=True))
            if run.experiment is None:
                logger.warning("Comet: metrics are stored offline instead, so that they are not lost")
        if run.experiment is None:
            run._guard("start", lambda: run._open(config, settings, name, tags, online=False))
        return run

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self._guard("log_parameters", lambda: self.experiment.log_parameters(dict(parameters)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        self._guard("log_metrics", lambda: self.experiment.log_metrics(dict(metrics), step=step))

    def end(self) -> dict[str, str]:
        """Close the experiment; returns its `key` and its `url` or `archive`, or nothing without an experiment."""
        self._guard("end", lambda: self.experiment.end())
        if self.key is None:
            return {}
        place = {"url": self.url} if self.url else {"archive": str(self.archive)}
        return {"key": self.key, **{name: text for name, text in place.items() if text}}

    def _open(self, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str], online: bool) -> None:
        # Otherwise Comet would report its own errors to its servers, and retry without a network.
        os.environ.setdefault("COMET_ERROR_TRACKING_ENABLE", "0")
        # Otherwise Comet would patch the frameworks to log automatically, and ask to be imported before them.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.WARNING)
        archives = (settings.llm_output_dir / "comet").resolve()
        archives.mkdir(parents=True, exist_ok=True)
        key = settings.comet_api_key.get_secret_value() if online and settings.comet_api_key else None
        if online:
            _check_reachable(comet_ml.config.get_backend_address())  # type: ignore[attr-defined]
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
                # Switched off, because they can contain secrets: source code, uncommitted changes, output, command line, host.
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
        if online and not experiment.url:
            raise ConnectionError("Comet started no experiment. Check COMET_API_KEY and tracking.workspace")
        self.experiment, self.key = experiment, experiment.get_key()
        if online:
            self.url = experiment.url
            logger.info("Comet: %s", self.url)
        else:
            self.archive = archives / f"{self.key}.zip"
            logger.info("Comet: offline; the archive will be %s (`comet upload` sends it)", self.archive)

    def _guard(self, operation: str, action: Callable[[], object]) -> None:
        if operation == "start" or self.experiment is not None:
            _guarded("Comet", operation, action)


class TensorBoardRun:
    """Event files in a folder; `tensorboard --logdir` shows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self.last_step = 0
        self.parameters: dict[str, Any] = {}
        logger.info("TensorBoard: %s (`tensorboard --logdir %s`)", folder, folder)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Store hyperparameters and versions; they are written together with the first metrics."""
        self.parameters = dict(parameters)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        _guarded("TensorBoard", "log_metrics", lambda: self._write(metrics, step))

    def end(self) -> dict[str, str]:
        """Close the event file; returns its `folder`, or nothing if no metrics were written."""
        if self.writer is None:
            return {}
        _guarded("TensorBoard", "end", lambda: self.writer.close())
        return {"folder": str(self.folder)}

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None or step < self.last_step:
            # A resumed run repeats the steps after its checkpoint. `purge_step` hides the values that the interrupted
            # run wrote for these steps.
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            text = json.dumps(self.parameters, indent=1, default=str)
            self.writer.add_text("parameters", f"```\n{text}\n```", step)
        self.last_step = step
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WandbRun:
    """One Weights & Biases run: online if the settings have a key, otherwise a folder that `wandb sync` sends later."""

    def __init__(self, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str]) -> None:
        self.run: Any = None
        self.place: dict[str, str] = {}
        key = settings.wandb_api_key
        if key is not None:
            _guarded("wandb", "start", lambda: self._open(config, settings, name, tags, key.get_secret_value()))
            if self.run is None:
                logger.warning("wandb: metrics are stored offline instead, so that they are not lost")
        if self.run is None:
            _guarded("wandb", "start", lambda: self._open(config, settings, name, tags, None))

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self._guard("log_parameters", lambda: self.run.config.update(dict(parameters)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers, with the step as one of them, because wandb's own step counter accepts each step only once."""
        self._guard("log_metrics", lambda: self.run.log({**metrics, "step": step}))

    def end(self) -> dict[str, str]:
        """Close the run; returns its `url`, or its `folder` if it is offline, or nothing without a run."""
        if self.run is None:
            return {}
        self._guard("end", lambda: self.run.finish())
        return self.place

    def _open(
        self, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str], key: str | None
    ) -> None:
        import wandb

        settings.llm_output_dir.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.project_name,
            name=name,
            # wandb refuses tags of more than 64 characters.
            tags=[tag[-64:] for tag in tags],
            dir=str(settings.llm_output_dir.resolve()),
            # With an explicit mode, wandb never asks the user for a key.
            mode="offline" if key is None else "online",
            reinit="create_new",
            settings=wandb.Settings(
                api_key=key,
                # Switched off, because they can contain secrets: source code, output, command line, environment, host.
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
                silent=True,
            ),
        )
        self.run.define_metric("*", step_metric="step")
        if key is None:
            self.place = {"folder": str(Path(self.run.dir).parent)}
            logger.info("wandb: offline, in %s (`wandb sync` sends it)", self.place["folder"])
        else:
            self.place = {"url": str(self.run.url)}
            logger.info("wandb: %s", self.place["url"])

    def _guard(self, operation: str, action: Callable[[], object]) -> None:
        if self.run is not None:
            _guarded("wandb", operation, action)
