"""The inputs of a run of a stage, checked before any model is loaded: device, tokenizer, labels, identity and folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.formatting.labels import check_labels
from llm_engineering.models.base_model import fitting_attention, load_config, load_model, weights_hash
from llm_engineering.models.device import (
    Device,
    check_training,
    check_vllm,
    choose_backend,
    choose_device,
    keys_beyond_unsloth,
)
from llm_engineering.models.tokenizer import check_rows, load_tokenizer
from llm_engineering.recipe.model_blocks import LoraConfig, Method
from llm_engineering.recipe.reward_blocks import RewardedConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainConfig, TrainingSetup
from llm_engineering.training import unsloth_policy
from llm_engineering.training.arguments import device_facts
from llm_engineering.training.losses import attend_by_row, keeps_rows_apart
from llm_engineering.training.policy import new_policy, trained_policy
from llm_engineering.training.processes import ranks
from llm_engineering.training.processes.job import Job
from llm_engineering.training.processes.sharding import loads_shards, sharded_loading
from llm_engineering.training.rewards import reward_files
from llm_engineering.training.unsloth_policy import Loading

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class TrainingRun(Generic[Config]):
    """The inputs of one run of a stage. Its identity and its folder follow from them.

    Attributes:
        stage: the stage's name in the table of stages.
        data: formatted splits; `train` and `validation` are required.
        config: the stage's block of the recipe.
        tokenizer: has the recipe's chat template; it is saved beside the adapter.
        parameters: logged by the trackers beside the hyperparameters: dataset versions, run id.
        start: folder of the adapter or full model that the stage starts from; None for the base model.
        resume_from: checkpoint to resume from instead of the newest one in the run's folder.
        reward_model: folder of the model of the reward `reward_model`; None without this reward.
    """

    stage: str
    data: DatasetDict
    config: Config
    setup: TrainingSetup
    settings: Settings
    device: Device
    tokenizer: PreTrainedTokenizerBase
    parameters: Mapping[str, Any] = field(default_factory=dict)
    start: Path | None = None
    resume_from: Path | None = None
    reward_model: Path | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the run computes: recipe, model revision, device, data, and starting weights."""
        return {
            **self.setup.model_dump(mode="json", exclude={"tracking"}),
            self.stage: self.config.model_dump(mode="json"),
            "device": device_facts(self.device),
            "dataset": dataset_digests(self.data),
            "reference": weights_hash(self.start) if self.start else "",
            **({"reward_code": reward_files(self.config)} if isinstance(self.config, RewardedConfig) else {}),
            **({"reward_model": weights_hash(self.reward_model)} if self.reward_model else {}),
        }

    @property
    def method(self) -> Method:
        """What is trained: all weights, or an adapter."""
        return self.config.method or self.setup.method

    def load_policy(self) -> PreTrainedModel | PeftModel:
        """Load the model to train: the model of the stage before, or the base model, with a fresh adapter if it has one."""
        model, start, settings, device, method = self.setup.model, self.start, self.settings, self.device, self.method
        lora = self.config.lora or LoraConfig()
        if device.backend == "unsloth":
            loading = Loading(self.setup.max_length, self.config.gradient_checkpointing, self.setup.seed)
            return unsloth_policy.load_policy(model, start, lora, settings, device, method, loading)
        with sharded_loading(self.config, self.setup, device):
            if start is not None:
                return trained_policy(model, start, settings, device, method)
            return new_policy(model, lora, settings, device, method)

    def keeps_rows_apart(self, policy: PreTrainedModel | PeftModel, by_row: bool) -> bool:
        """Whether concatenated rows do not attend to each other (`losses.keeps_rows_apart`).

        If the weights are sharded, the main process tries it with the whole model in its own memory.
        """
        if not loads_shards(self.config, self.setup):
            with self.device.autocast():
                return keeps_rows_apart(policy, by_row)
        found = False
        if ranks.is_main():
            # FlashAttention has no kernels for processors.
            device = self.device._replace(name="cpu", attn_implementation=fitting_attention(policy.config, "sdpa"))
            whole = load_model(self.setup.model, self.settings, device)
            found = keeps_rows_apart(whole, by_row and attend_by_row(whole))
        return ranks.from_main(found)

    @cached_property
    def folder(self) -> Path:
        """The folder with the run's checkpoints. Each identity has its own, so no run resumes another run's."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return self.settings.llm_output_dir.resolve() / "training" / f"{self.stage}-{digest[:12]}"


def dataset_digests(data: DatasetDict) -> dict[str, str]:
    """SHA-256 of the rows of each split."""
    splits = {}
    for name in sorted(data):
        digest = hashlib.sha256()
        for row in data[name]:
            digest.update(json.dumps(row, sort_keys=True).encode())
        splits[name] = digest.hexdigest()
    return splits


def prepare_run(job: Job, block: type[Config], data: DatasetDict, settings: Settings) -> TrainingRun[Config]:
    """Choose the device, load the tokenizer and check the labels, before any model is loaded.

    Args:
        block: the class of the stage's block of the recipe.
        data: formatted splits; the job's field `data` is not read.

    Raises:
        RequestError: this machine cannot train with this method, optimiser or backend.
        WorkError: the labels of a row are wrong.
    """
    stage, config, setup, start = job.stage, block.model_validate(job.config), job.setup, job.start

    # Choose the device and the backend
    method = config.method or setup.method
    lora = config.lora or LoraConfig()
    if start is None:
        config = config.model_copy(update={"method": method, "lora": lora})
    adapter_keys = keys_beyond_unsloth(start) if start else lora.beyond_unsloth
    new = setup.model.added_tokens
    device, compute = choose_device(setup.compute), setup.compute
    if not config.trains_with_unsloth:
        compute = compute.model_copy(update={"backend": "transformers"})
    device = choose_backend(device, compute, method, adapter_keys=adapter_keys, new_tokens=new)

    model = load_config(setup.model, settings)
    attention = fitting_attention(model, device.attn_implementation)
    if device.backend == "transformers" and attention != device.attn_implementation:
        reason = f"attention {attention}: {setup.model.name_or_path} has no {device.attn_implementation}"
        device = device._replace(attn_implementation=attention, reasons=[*device.reasons, reason])

    # Load the tokenizer
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    check_rows(tokenizer, model.get_text_config().vocab_size, new)

    # Check the optimiser and the labels
    check_training(stage, method, config.optim, device)
    if config.library_arguments.get("use_vllm"):
        check_vllm(f"{stage}.use_vllm", "false", device)
    check_labels(data, tokenizer, setup.train_on_prompt)
    return TrainingRun(
        *(stage, data, config, setup, settings, device, tokenizer),
        *(job.parameters, start, job.resume_from, job.reward_model),
    )
