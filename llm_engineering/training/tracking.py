"""Where metrics go: Comet ML, TensorBoard, Weights & Biases.

Nothing that happens here can fail a training run: it is said, and training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrackingConfig

logger = logging.getLogger(__name__)


def check_trackers(config: TrackingConfig) -> None:
    """Raise a RequestError if the recipe reports to a package that is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise RequestError(
                f"tracking.report_to names {name}, which is not installed. Install it "
                f"(pip install 'llm-engineering[{name}]'), or take it out of the list."
            )


class Trackers:
    """All places that the metrics of one run go to.

    Comet always, as `tracking.comet` says; TensorBoard and Weights & Biases where `tracking.report_to` names them.
    """

    def __init__(self, runs: Mapping[str, CometRun | TensorBoardRun | WandbRun]) -> None:
        self.runs = runs

    @classmethod
    def start(cls, config: TrackingConfig, settings: Settings, folder: Path, tags: Sequence[str]) -> Trackers:
        """Start a run of each, named after `folder`, the folder of the training run.

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
        """Close all; where each can be seen, by its name."""
        return {name: run.end() for name, run in self.runs.items()}


def _guarded(service: str, what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # Services raise their own and their transport's errors; none may end a training run.
        logger.warning("%s: %s failed (%s: %s); training goes on", service, what, type(error).__name__, error)


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

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        self._guard("log_metrics", lambda: self.experiment.log_metrics(dict(metrics), step=step))

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
        if what == "start" or self.experiment is not None:
            _guarded("Comet", what, action)


class TensorBoardRun:
    """Event files in a folder, which `tensorboard --logdir` shows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self.last_step = 0
        self.parameters: dict[str, Any] = {}
        logger.info("TensorBoard: %s (`tensorboard --logdir %s`)", folder, folder)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Keep them for the text that the first metrics are written with."""
        self.parameters = dict(parameters)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        _guarded("TensorBoard", "log_metrics", lambda: self._write(metrics, step))

    def end(self) -> dict[str, str]:
        """Close the event file: its `folder`, or nothing if none was written."""
        if self.writer is None:
            return {}
        _guarded("TensorBoard", "end", lambda: self.writer.close())
        return {"folder": str(self.folder)}

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None or step < self.last_step:
            # A run that was resumed repeats steps after its checkpoint: the former ones are no longer shown.
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            text = json.dumps(self.parameters, indent=1, default=str)
            self.writer.add_text("parameters", f"```\n{text}\n```", step)
        self.last_step = step
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WandbRun:
    """One Weights & Biases run: online with a key in the settings, else a folder that `wandb sync` sends later."""

    def __init__(self, config: TrackingConfig, settings: Settings, name: str, tags: Sequence[str]) -> None:
        self.run: Any = None
        self.place: dict[str, str] = {}
        key = settings.wandb_api_key
        if key is not None:
            _guarded("wandb", "start", lambda: self._open(config, settings, name, tags, key.get_secret_value()))
            if self.run is None:
                logger.warning("wandb: going on offline, so that no metric is lost")
        if self.run is None:
            _guarded("wandb", "start", lambda: self._open(config, settings, name, tags, None))

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters and versions."""
        self._guard("log_parameters", lambda: self.run.config.update(dict(parameters)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step: as a number of its own, for wandb's own counter takes no step twice."""
        self._guard("log_metrics", lambda: self.run.log({**metrics, "step": step}))

    def end(self) -> dict[str, str]:
        """Close the run: its `url`, or its `folder` when offline; empty without a run."""
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
            # wandb refuses longer ones.
            tags=[tag[-64:] for tag in tags],
            dir=str(settings.llm_output_dir.resolve()),
            # A mode that is named never asks for a key.
            mode="offline" if key is None else "online",
            reinit="create_new",
            settings=wandb.Settings(
                api_key=key,
                # What we do not ask for can hold secrets: source, output, command line, environment, host.
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

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        if self.run is not None:
            _guarded("wandb", what, action)
