"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) with TRL's DPOTrainer."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, DatasetDict, disable_caching, enable_caching, is_caching_enabled
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.models.utils import _ForwardRedirection

from llm_engineering.formatting.labels import check_labels
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.models.device import Device, check_training, choose_backend, choose_device, uses_dora
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import DPOConfig, TrainConfig, TrainingSetup
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.job import Job, TrainingResult
from llm_engineering.training.losses import (
    attend_by_row,
    causal_model,
    keeps_rows_apart,
    row_lengths,
    token_log_probs,
    why_not_from_hidden_states,
)
from llm_engineering.training.policy import trained_policy
from llm_engineering.training.run import TrainingRun, run_training
from llm_engineering.training.telemetry import TelemetryCallback, TrainingFlops
from llm_engineering.training.trainer import ResumableTrainer
from llm_engineering.training.unsloth_policy import Loading

logger = logging.getLogger(__name__)

LABEL_PAIRS = 2


def train_dpo(
    data: DatasetDict,
    sft_adapter: Path,
    config: DPOConfig,
    setup: TrainingSetup,
    settings: Settings,
    parameters: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train the SFT adapter, or the full SFT model, further on `data["train"]`; the reference is that model as it was.

    Args:
        data: splits with `prompt_ids`, `chosen_ids` and `rejected_ids`; the answers end with their end-of-turn token.
        sft_adapter: the folder of the SFT adapter, or of the full SFT model.
        resume_from: a checkpoint folder to go on from; without it, the newest complete one of the same run.

    Raises:
        WorkError: an answer is empty or has no end of turn (`check_labels`), or training fails.
    """
    device = choose_backend(choose_device(setup.compute), setup.compute, setup.method, use_dora=uses_dora(sft_adapter))
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    check_training("dpo", setup.method, config.optim, device)
    check_labels(data, tokenizer)
    pairs = data["train"].select(range(min(LABEL_PAIRS, len(data["train"]))))
    label_rows = [
        (pair["prompt_ids"] + pair[name], [IGNORE_INDEX] * len(pair["prompt_ids"]) + pair[name])
        for pair in pairs
        for name in ("chosen_ids", "rejected_ids")
    ]
    start = "-".join(_file_hash(file) for file in sorted(sft_adapter.glob("*.safetensors")))
    run = TrainingRun(
        "dpo", config, setup, settings, device, tokenizer, data, label_rows, parameters or {}, start, resume_from
    )

    def build(used: TrainConfig, telemetry: TelemetryCallback) -> _FormattedDPOTrainer:
        assert isinstance(used, DPOConfig)
        loading = Loading(setup.max_length, used.gradient_checkpointing, setup.seed)
        policy = trained_policy(setup.model, sft_adapter, settings, device, setup.method, loading)
        # A policy with an adapter holds its reference as a second one.
        reference = None if isinstance(policy, PeftModel) else copy.deepcopy(policy).requires_grad_(False)
        return dpo_trainer(policy, tokenizer, data, used, setup, device, run.folder, telemetry, reference)

    return run_training(run, build)


def train_dpo_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """`train_dpo` for a job, in this process, which may be one of several."""
    assert job.start is not None
    config = DPOConfig.model_validate(job.config)
    return train_dpo(data, job.start, config, job.setup, settings, job.parameters, job.resume_from)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _FormattedDPOTrainer(ResumableTrainer, DPOTrainer):
    """TRL's trainer for rows that are tokenised already, which DPOTrainer has no option for; and one that resumes."""

    by_row = False

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, model_kwargs: dict[str, Any], input_ids: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """What TRL asks for where it works without logits: `(rows, length - 1)` each, 0 where nothing is answered.

        The rows are computed one behind another, without their padding. Entropy is not computed.
        """
        inner = causal_model(self.accelerator.unwrap_model(model))
        kept = model_kwargs["attention_mask"].bool()
        position_ids = (kept.cumsum(dim=1) - 1)[kept].unsqueeze(0)
        lengths = {"row_lengths": row_lengths(position_ids)} if self.by_row else {}
        with self.accelerator.autocast():
            outputs = inner.base_model(
                input_ids=input_ids[kept].unsqueeze(0), position_ids=position_ids, use_cache=False, **lengths
            )
            answered = completion_mask.bool()
            answered[:, 0] = False
            # A token is predicted by the position before it, which is never that of another row: prompts come first.
            places = (kept.flatten().cumsum(dim=0) - 1).view_as(kept)[answered]
            head = inner.get_output_embeddings().weight
            found = token_log_probs(outputs.last_hidden_state[0, places - 1], head, input_ids[answered])
        log_probs = found.new_zeros(answered.shape).masked_scatter(answered, found)[:, 1:]
        return log_probs, torch.zeros_like(log_probs), outputs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        training = model.training
        if training:
            mask = inputs["attention_mask"]
            computed = int(mask.sum()) if self.use_liger_kernel else mask.numel()
            self.count(mask.sum(dim=1).tolist(), int(inputs["completion_mask"].sum()), computed)
        result = super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        if self.use_liger_kernel:
            self._metrics["train" if training else "eval"].pop("entropy", None)
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Of a checkpoint with adapters in subfolders, transformers loads those alone: the reference, and not the
        # policy, which would start over without a word.
        if not isinstance(self.model, PeftModel):
            return
        self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        self.model.set_adapter("default")


def dpo_trainer(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    config: DPOConfig,
    setup: TrainingSetup,
    device: Device,
    folder: Path,
    telemetry: TelemetryCallback | None = None,
    reference: PreTrainedModel | None = None,
) -> _FormattedDPOTrainer:
    """TRL's trainer. Of a policy with a trained adapter and no `reference`, TRL takes a copy as the reference."""
    arguments = trl.DPOConfig(
        **training_arguments(config, device, setup, folder),
        beta=config.beta,
        loss_type=[config.loss_type],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        # Over-long pairs were set aside or cut, and counted, when the data was formatted; nothing is cut here.
        max_length=None,
    )
    flops, by_row, unpadded = TrainingFlops.of(policy), False, False
    if device.backend == "transformers":
        by_row = attend_by_row(policy) and (reference is None or attend_by_row(reference))
        reason = why_not_from_hidden_states(policy, setup.compute)
        if reason is None and not keeps_rows_apart(policy, by_row):
            reason = "rows that lie one behind another would see each other"
        unpadded = reason is None
        logger.info("logits: %s", f"of whole batches, for {reason}" if reason else "of answers alone, in chunks")
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    # What TRL precomputes it would keep beside the dataset, which is an artifact of another step.
    cached = is_caching_enabled()
    disable_caching()
    try:
        trainer = _FormattedDPOTrainer(
            model=policy,
            ref_model=reference,
            args=arguments,
            train_dataset=data["train"].select_columns(columns),
            eval_dataset=data["validation"].select_columns(columns),
            processing_class=tokenizer,
            callbacks=[telemetry] if telemetry else [],
        )
    finally:
        if cached:
            enable_caching()
    # TRL's name for its branch that never sees logits; Liger's own kernels are for CUDA alone, and are not used.
    trainer.use_liger_kernel = unpadded
    trainer._forward_redirection = _ForwardRedirection()
    trainer.by_row, trainer.flops = by_row, flops
    trainer.asks_reference = not config.precompute_ref_log_probs
    return trainer
