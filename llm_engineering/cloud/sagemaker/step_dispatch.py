"""Runs a step of the chain that uses a model, such as generation and evaluation, as a SageMaker job."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llm_engineering.cloud.package import PROJECT_ROOT, code_hash, folder_hash
from llm_engineering.cloud.sagemaker.dispatch import Work
from llm_engineering.cloud.sagemaker.request import INPUTS, MODEL
from llm_engineering.cloud.sagemaker.s3 import unpack, upload_code, upload_folder
from llm_engineering.cloud.sagemaker.weights import hub_weights, is_copied
from llm_engineering.data.storage import work_folder
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

# The folders and files of a step, in the channel `job` and in the results.
ARGUMENTS = "arguments.json"
FACTS = "facts.json"
OUTPUT = "output"
# The channel of the files that the recipe names.
FILES = "recipe"


class StepWork(Work[Path]):
    """A step and its jobs. The result is a folder with OUTPUT and FACTS.

    Args:
        command: the command of the job, which reads ARGUMENTS.
        inputs: the folders that the step reads, by channel, each with a hash of its content.
    """

    environment: ClassVar[dict[str, str]] = {
        # A step saves no checkpoints, and reads there what people said.
        "LLM_OUTPUT_DIR": f"{INPUTS}/{FILES}",
        # No bars of libraries in the log.
        "TQDM_DISABLE": "1",
        # ZenML's own files, which no other job sees.
        "ZENML_CONFIG_PATH": "/opt/ml/zenml",
        "ZENML_LOCAL_STORES_PATH": "/opt/ml/zenml/stores",
    }

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        arguments: Mapping[str, Any],
        inputs: Mapping[str, tuple[Path, str]],
        model: ModelConfig,
        config: SageMakerConfig,
        settings: Settings,
        recipe: str,
    ) -> None:
        identity = {
            "step": name,
            "arguments": dict(arguments),
            "inputs": {channel: content for channel, (_, content) in inputs.items()},
            "code": code_hash(PROJECT_ROOT, "steps", "docker/retrain.lock"),
        }
        # The image without ZenML has no steps, and a step is one process.
        machine = {"image": settings.sagemaker_retrain_image or "none", "instance_count": 1}
        super().__init__(name, identity, config.model_copy(update=machine), settings, recipe)
        self._command, self.arguments, self.inputs, self.model = list(command), arguments, inputs, model

    def command(self) -> list[str]:
        """The command of the step."""
        return self._command

    def upload(self) -> dict[str, str]:
        """Upload code and folders once for all jobs of the step; returns the addresses by channel."""
        if not self._channels:
            self._channels = {"code": upload_code(self.account)} | {
                channel: upload_folder(self.account, folder, "steps", content)
                for channel, (folder, content) in self.inputs.items()
            }
            if is_copied(self.config, self.model):
                self._channels[MODEL] = hub_weights(self.account, self.model, self.settings)
        return self._channels

    def upload_job(self, name: str) -> str:
        """Upload the arguments."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / ARGUMENTS).write_text(json.dumps(self.arguments, indent=1), encoding="utf-8")
            (folder / "identity.json").write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
            return upload_folder(self.account, folder, "jobs", name, folder_hash(folder))

    def fetch(self, description: dict[str, Any]) -> Path:
        """Download output and facts of a completed job, and mark the job as fetched."""
        name, uri = description["TrainingJobName"], description["ModelArtifacts"]["S3ModelArtifacts"]
        folder = unpack(self.account, uri, name, work_folder(), [OUTPUT, FACTS])
        self.downloaded(description)
        return folder
