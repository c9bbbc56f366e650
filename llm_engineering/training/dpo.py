"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) with TRL's DPOTrainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import convert_outputs_to_fp32  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, disable_caching, enable_caching, is_caching_enabled
from peft import PeftModel
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.models.utils import _ForwardRedirection

from llm_engineering.errors import WorkError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.losses import (
    attend_by_row,
    causal_model,
    keeps_rows_apart,
    row_lengths,
    token_log_probs,
    why_not_from_hidden_states,
)
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.telemetry.work import TelemetryCallback
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.resumable import ResumableTrainer
from llm_engineering.training.training_run import TrainingRun, prepare_run

logger = logging.getLogger(__name__)

# Largest differences between two computations of the same log-probability, in nats a token: in float32, and in half precision,
# where an answer of SmolLM2 differs by up to 0.02 between a row alone and a row in a batch.
_SUMMED = 1e-4
_ROUNDED = 5e-2


def train_dpo(
    data: DatasetDict,
    start: Path | None,
    config: DPOConfig,
    setup: TrainingSetup,
    settings: Settings,
    parameters: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train a model further on `data["train"]`. The reference is the model as it is before DPO.

    Args:
        data: splits with `prompt_ids`, `chosen_ids` and `rejected_ids`; each answer ends with its end-of-turn token.
        start: folder of the adapter, or of the full model, to train; None for the base model.
        parameters: logged by the trackers beside the hyperparameters.
        resume_from: checkpoint folder to resume from; the default is the newest complete one of the same run.

    Raises:
        RequestError: this machine cannot train with this method or optimiser.
        WorkError: an answer is empty or has no end of turn (`check_labels`), or training fails.
    """
    # Choose the device, load the tokenizer, check the labels
    run = prepare_run("dpo", data, config, setup, settings, start, parameters, resume_from)

    # Load the model, and make its trainer
    def make_trainer(config: DPOConfig, telemetry: TelemetryCallback) -> FormattedDPOTrainer:
        return dpo_trainer(run, run.load_policy(), config, telemetry)

    # Train, save the model, write the report
    return run_training(run, make_trainer)


def train_dpo_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Run `train_dpo` for a job in this process, which may be one of several."""
    config = DPOConfig.model_validate(job.config)
    return train_dpo(data, job.start, config, job.setup, settings, job.parameters, job.resume_from)


def dpo_trainer(
    run: TrainingRun[DPOConfig],
    policy: PreTrainedModel | PeftModel,
    config: DPOConfig,
    telemetry: TelemetryCallback | None = None,
) -> FormattedDPOTrainer:
    """Make TRL's trainer for tokenised pairs. The reference is `policy` as it is now.

    Args:
        policy: the model to train; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.
    """
    # TRL keeps the reference of an adapter as a second adapter. A full model needs a second model. If the reference's
    # log-probabilities are precomputed, the policy itself computes them, because it has not changed yet.
    precomputed = config.precompute_ref_log_probs
    needs_second = not isinstance(policy, PeftModel) and not precomputed
    reference = copy.deepcopy(policy).requires_grad_(False) if needs_second else None

    for model in (policy, reference):
        if model is not None:
            disable_dropout(model)

    # Find out which computations can be saved with this model
    flops, by_row, unpadded = TrainingFlops.of(policy), False, False
    if run.device.backend == "transformers":
        by_row = attend_by_row(policy) and (reference is None or attend_by_row(reference))
        router_coefficient = config.library_arguments.get("router_aux_loss_coef")
        with run.device.autocast():
            reason = why_not_from_hidden_states(policy, run.setup.compute, router_coefficient)
            if config.library_arguments.get("use_weighting"):
                reason = "use_weighting needs them"
            if reason is None and not keeps_rows_apart(policy, by_row):
                reason = "concatenated rows would see each other"
        unpadded = reason is None
        logger.info("logits: %s", f"of whole batches, because {reason}" if reason else "of answers only, in chunks")

    # Set the training arguments
    arguments = trl.DPOConfig(
        **training_arguments(config, run.device, run.setup, run.folder),
        beta=config.beta,
        loss_type=[config.loss_type, *(["sft"] if config.sft_weight else [])],
        loss_weights=[1.0, *([config.sft_weight] if config.sft_weight else [])],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=precomputed,
        # Formatting has already cut or set aside the pairs that are too long, and counted them. TRL cuts nothing.
        max_length=None,
    )

    # Make the trainer. With caching, TRL would write precomputed log-probabilities into the dataset's folder. This
    # folder is an artifact of another step, so it must not change.
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    caching = is_caching_enabled()
    disable_caching()
    try:
        trainer = FormattedDPOTrainer(
            model=policy,
            ref_model=reference,
            args=arguments,
            train_dataset=run.data["train"].select_columns(columns),
            eval_dataset=run.data["validation"].select_columns(columns),
            processing_class=run.tokenizer,
            callbacks=[telemetry] if telemetry else [],
            unpadded=unpadded,
            by_row=by_row,
        )
    finally:
        if caching:
            enable_caching()

    complete_reference(policy)
    trainer.flops = flops
    trainer.asks_reference = not precomputed
    return trainer


def disable_dropout(model: PreTrainedModel | PeftModel) -> None:
    """Set every probability of dropout to 0, so that policy and reference are equal in the first step.

    TRL disables only modules of the class Dropout. OPT, Llama and others read a number from their config into a module, and
    Falcon reads it from the config in each forward pass.
    """
    for part in (*model.modules(), causal_model(model).config.get_text_config()):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or isinstance(part, _DropoutNd)):
                setattr(part, name, 0.0)


def complete_reference(policy: PreTrainedModel | PeftModel) -> None:
    """Copy the weights that TRL leaves out when it copies the adapter `default` to `ref`.

    TRL copies modules, such as `lora_A.default.weight`. The adapter of an embedding, and single trained tokens, are
    parameters, such as `lora_embedding_A.default`.
    """
    if isinstance(policy, PeftModel):
        weights = dict(policy.named_parameters())
        for name, weight in weights.items():
            if name.endswith(".default"):
                weights[f"{name.removesuffix('default')}ref"].data.copy_(weight.data)


class FormattedDPOTrainer(ResumableTrainer, DPOTrainer):
    """TRL's DPOTrainer with exact resume. It takes pairs that are already tokenised; TRL has no option for them.

    Args:
        unpadded: compute log-probabilities without padding and without the logits of a whole batch.
        by_row: whether the attention of policy and reference takes `row_lengths`.
    """

    def __init__(self, *args: Any, unpadded: bool, by_row: bool, **kwargs: Any) -> None:
        self.unpadded, self.by_row = unpadded, by_row
        super().__init__(*args, **kwargs)
        self._choose_branch()

    def _choose_branch(self) -> None:
        """Use the branch of TRL's code that never computes the logits of a whole batch, if `unpadded`.

        TRL names it after Liger, but this class does not use Liger's CUDA kernels.
        """
        self.use_liger_kernel = self.unpadded
        self._forward_redirection = _ForwardRedirection()

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL calls this in its constructor. The reference must already be computed as the policy is in training.
        assert isinstance(self.model, PreTrainedModel | PeftModel)
        complete_reference(self.model)
        self._choose_branch()
        with self.accelerator.autocast():
            rows: Dataset = super()._precompute_ref_logps(dataset, *args, **kwargs)
        return rows

    def _compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        # In training, accelerate converts the logits to float32. It has not wrapped the model yet, and sums of bf16
        # log-probabilities have two to three digits.
        computed = model if self.use_liger_kernel else convert_outputs_to_fp32(model)
        return super()._compute_ref_log_probs(computed, inputs)  # type: ignore[no-untyped-call]

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, model_kwargs: dict[str, Any], input_ids: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Log-probabilities for TRL's branch without logits, `(rows, length - 1)`; 0 outside the answers.

        Concatenates the rows without their padding. The entropies are zeros, because they are not computed.
        """
        inner = causal_model(self.accelerator.unwrap_model(model))
        real = model_kwargs["attention_mask"].bool()
        position_ids = (real.cumsum(dim=1) - 1)[real].unsqueeze(0)
        lengths = {"row_lengths": row_lengths(position_ids)} if self.by_row else {}
        with self.accelerator.autocast():
            outputs = inner.base_model(
                input_ids=input_ids[real].unsqueeze(0), position_ids=position_ids, use_cache=False, **lengths
            )
            answered = completion_mask.bool()
            answered[:, 0] = False
            # The position before a token predicts it. It is in the same row, because each row starts with its prompt.
            places = (real.flatten().cumsum(dim=0) - 1).view_as(real)[answered]
            head = inner.get_output_embeddings().weight
            answer_log_probs = token_log_probs(outputs.last_hidden_state[0, places - 1], head, input_ids[answered])
        log_probs = answer_log_probs.new_zeros(answered.shape).masked_scatter(answered, answer_log_probs)[:, 1:]
        return log_probs, torch.zeros_like(log_probs), outputs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Compute TRL's loss, and check in the first step that the policy is still equal to the reference.

        Raises:
            WorkError: their log-probabilities differ.
        """
        training = model.training
        if training:
            mask = inputs["attention_mask"]
            computed = int(mask.sum()) if self.use_liger_kernel else mask.numel()
            self.count(mask.sum(dim=1).tolist(), int(inputs["completion_mask"].sum()), computed)
        result = super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        if self.use_liger_kernel:
            self._metrics["train" if training else "eval"].pop("entropy", None)
        if training and self.state.global_step == 0:
            self._check_margin(float(inputs["completion_mask"].sum() / len(inputs["completion_mask"])))
        return result

    def _check_margin(self, tokens: float) -> None:
        """Check the newest reward margin, the mean over the pairs of a batch. `tokens` is the mean length of an answer."""
        margin = self._metrics["train"]["rewards/margins"][-1]
        half = self.args.bf16 or self.args.fp16
        if abs(margin) > self.beta * tokens * (_ROUNDED if half else _SUMMED):
            raise WorkError(
                f"DPO starts from its reference, so the reward margin of the first step must be 0, and it is {margin:.4g}: policy "
                "and reference are not computed alike. Use --set compute.dtype=float32 or "
                "--set dpo.precompute_ref_log_probs=false; if the error stays, this model cannot be trained with DPO here."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # If a checkpoint has adapters in subfolders, transformers loads only these. It would load the reference but not
        # the policy, and the policy would silently start over.
        if not isinstance(self.model, PeftModel):
            return
        self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        self.model.set_adapter("default")
