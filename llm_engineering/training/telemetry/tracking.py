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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrackingConfig

logger = logging.getLogger(__name__)

# Seconds that Comet has to answer before metrics are stored offline.
PROBE_S = 5.0

T = TypeVar("T")


def check_trackers(config: TrackingConfig) -> None:
    """Raise a RequestError if the recipe reports to a package that is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise RequestError(
                f"tracking.report_to names {name}, which is not installed. Install it "
                f"(pip install 'llm-engineering[{name}]'), or remove it from the list."
            )


class Trackers:
    """All trackers of one run, by name; None for one that could not be started.

    Comet is used unless `tracking.comet` is off, TensorBoard and Weights & Biases if `tracking.report_to` names them.
    """

    def __init__(self, runs: Mapping[str, CometRun | TensorBoardRun | WandbRun | None]) -> None:
        self.runs = runs

    @classmethod
    def start(cls, config: TrackingConfig, settings: Settings, folder: Path, tags: Sequence[str]) -> Trackers:
        """Start a run in each tracker, named after `folder`, the folder of the training run.

        Raises:
            RequestError: a package is not installed.
        """
        check_trackers(config)
        name, output_dir = folder.name, settings.llm_output_dir.resolve()
        runs: dict[str, CometRun | TensorBoardRun | WandbRun | None] = {}
        if config.comet == "off":
            logger.info("Comet: switched off by the recipe (tracking.comet)")
        else:
            comet_key = settings.comet_api_key if config.comet == "auto" else None
            runs["Comet"] = _started("Comet", comet_key, lambda key: CometRun(config, output_dir, name, tags, key))
        if "tensorboard" in config.report_to:
            runs["TensorBoard"] = TensorBoardRun(folder / "tensorboard")
        if "wandb" in config.report_to:
            wandb_key = settings.wandb_api_key
            runs["wandb"] = _started("wandb", wandb_key, lambda key: WandbRun(config, output_dir, name, tags, key))
        return cls(runs)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self._each("log_parameters", lambda run: run.log_parameters(dict(parameters)))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log the finite numbers among `metrics` at a step."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._each("log_metrics", lambda run: run.log_metrics(numbers, step))

    def end(self) -> dict[str, dict[str, str]]:
        """Close all trackers; returns where each run can be seen, by the tracker's name in lower case."""
        self._each("end", lambda run: run.end())
        return {name.lower(): run.place if run is not None else {} for name, run in self.runs.items()}

    def _each(self, operation: str, action: Callable[[Any], object]) -> None:
        for name, run in self.runs.items():
            if run is not None:
                _guarded(name, operation, partial(action, run))


def _guarded(service: str, operation: str, action: Callable[[], T]) -> T | None:
    try:
        return action()
    except Exception as error:  # Trackers raise many kinds of errors, and no tracker may end a training run.
        logger.warning("%s: %s failed (%s: %s); training continues", service, operation, type(error).__name__, error)
        return None


def _started(service: str, key: SecretStr | None, start: Callable[[str | None], T]) -> T | None:
    """Start a run online, if there is a key, or else offline; None if it fails."""
    if key is not None:
        run = _guarded(service, "start", lambda: start(key.get_secret_value()))
        if run is not None:
            return run
        logger.warning("%s: metrics are stored offline instead, so that they are not lost", service)
    return _guarded(service, "start", lambda: start(None))


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
    """One Comet experiment: online with a key, otherwise a zip file that `comet upload` sends later.

    Attributes:
        place: the experiment's `key`, and its `url` or its `archive`, which exists after `end`.
    """

    def __init__(
        self, config: TrackingConfig, output_dir: Path, name: str, tags: Sequence[str], key: str | None
    ) -> None:
        # Otherwise Comet would report its own errors to its servers, and retry without a network.
        os.environ.setdefault("COMET_ERROR_TRACKING_ENABLE", "0")
        # Otherwise Comet would patch the frameworks to log automatically, and ask to be imported before them.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.WARNING)
        online, archives = key is not None, output_dir / "comet"
        archives.mkdir(parents=True, exist_ok=True)
        if online:
            _check_reachable(comet_ml.config.get_backend_address())  # type: ignore[attr-defined]
        self.experiment = comet_ml.start(
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
        if online and not self.experiment.url:
            raise ConnectionError("Comet started no experiment. Check COMET_API_KEY and tracking.workspace")
        self.place: dict[str, str] = {"key": self.experiment.get_key()}
        if online:
            self.place["url"] = self.experiment.url
            logger.info("Comet: %s", self.place["url"])
        else:
            self.place["archive"] = str(archives / f"{self.place['key']}.zip")
            logger.info("Comet: offline; the archive will be %s (`comet upload` sends it)", self.place["archive"])

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self.experiment.log_parameters(parameters)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        self.experiment.log_metrics(metrics, step=step)

    def end(self) -> None:
        """Close the experiment."""
        self.experiment.end()


class TensorBoardRun:
    """Event files in a folder; `tensorboard --logdir` shows them.

    Attributes:
        place: the `folder`; empty if no metrics were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place: dict[str, str] = {}
        self.writer: Any = None
        self.last_step = 0
        self.parameters: dict[str, Any] = {}
        logger.info("TensorBoard: %s (`tensorboard --logdir %s`)", folder, folder)

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        """Store hyperparameters and versions; they are written together with the first metrics."""
        self.parameters = parameters

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None or step < self.last_step:
            # A resumed run repeats the steps after its checkpoint. `purge_step` hides the values that the interrupted
            # run wrote for these steps.
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            self.place = {"folder": str(self.folder)}
            text = json.dumps(self.parameters, indent=1, default=str)
            self.writer.add_text("parameters", f"```\n{text}\n```", step)
        self.last_step = step
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


class WandbRun:
    """One Weights & Biases run: online with a key, otherwise a folder that `wandb sync` sends later.

    Attributes:
        place: the run's `url`, or its `folder`.
    """

    def __init__(
        self, config: TrackingConfig, output_dir: Path, name: str, tags: Sequence[str], key: str | None
    ) -> None:
        import wandb

        output_dir.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            project=config.project_name,
            name=name,
            # wandb refuses tags of more than 64 characters.
            tags=[tag[-64:] for tag in tags],
            dir=str(output_dir),
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
        # wandb's own step counter accepts each step only once, so the step is one of the numbers.
        self.run.define_metric("*", step_metric="step")
        if key is None:
            self.place = {"folder": str(Path(self.run.dir).parent)}
            logger.info("wandb: offline, in %s (`wandb sync` sends it)", self.place["folder"])
        else:
            self.place = {"url": str(self.run.url)}
            logger.info("wandb: %s", self.place["url"])

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self.run.config.update(parameters)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        self.run.log({**metrics, "step": step})

    def end(self) -> None:
        """Close the run."""
        self.run.finish()
