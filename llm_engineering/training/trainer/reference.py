"""What the stages with a reference share: the model as it is before the stage, kept beside the one that is trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import convert_outputs_to_fp32  # type: ignore[import-untyped]
from datasets import Dataset, disable_caching, enable_caching, is_caching_enabled
from peft import PeftModel
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection

from llm_engineering.errors import WorkError
from llm_engineering.recipe.stage_blocks import ReferenceConfig
from llm_engineering.training.losses import (
    attend_by_row,
    causal_model,
    continues_prompts,
    keeps_rows_apart,
    token_log_probs,
    why_not_from_hidden_states,
)
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.trainer.resumable import ResumableTrainer
from llm_engineering.training.training_run import TrainingRun

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=ReferenceConfig)

# Largest differences between two computations of the same log-probability, in nats a token: in float32, and in half precision,
# where an answer of SmolLM2 differs by up to 0.02 between a row alone and a row in a batch.
_SUMMED = 1e-4
_ROUNDED = 5e-2


def frozen_copy(policy: PreTrainedModel | PeftModel, needed: bool) -> PreTrainedModel | None:
    """Switch dropout off, and copy a full model as the reference, if training needs one.

    TRL keeps the reference of an adapter as a second adapter. If the reference's log-probabilities are precomputed, the
    policy itself computes them, because it has not changed yet. Both need no copy.
    """
    reference = None
    if needed and not isinstance(policy, PeftModel):
        reference = copy.deepcopy(policy)
        reference.requires_grad_(False)
    for model in (policy, reference):
        if model is not None:
            disable_dropout(model)
    return reference


class Shortcuts(NamedTuple):
    """The computations that can be saved with a model.

    Attributes:
        by_row: the attention of policy and reference takes `row_lengths`.
        unpadded: log-probabilities are computed without padding and without the logits of a whole batch.
        shares_prompts: the prompt of a pair is computed once.
    """

    by_row: bool = False
    unpadded: bool = False
    shares_prompts: bool = False


def find_shortcuts(
    run: TrainingRun[Config],
    policy: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | PeftModel | None,
    config: Config,
    pairs: bool,
) -> Shortcuts:
    """Try which computations can be saved with this model, and log why the others cannot."""
    if run.device.backend != "transformers":
        return Shortcuts()
    by_row = attend_by_row(policy) and (reference is None or attend_by_row(reference))
    with run.device.autocast():
        reason = why_not_from_hidden_states(
            policy, run.setup.compute, config.library_arguments.get("router_aux_loss_coef")
        )
        if config.library_arguments.get("use_weighting"):
            reason = "use_weighting needs them"
        if reason is None and not keeps_rows_apart(policy, by_row):
            reason = "concatenated rows would see each other"
        if reason is not None:
            separate = "the logits are of whole batches"
        elif not by_row:
            separate = "only sdpa without sliding windows can share them"
        else:
            separate = "" if not pairs or continues_prompts(policy) else "a shared one changes the hidden states"
    logger.info("logits: %s", f"of whole batches, because {reason}" if reason else "of answers only, in chunks")
    if pairs:
        logger.info(
            "prompts: computed %s", f"for each answer, because {separate}" if separate else "once for both answers"
        )
    return Shortcuts(by_row, unpadded=reason is None, shares_prompts=pairs and not separate)


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


@contextmanager
def uncached() -> Iterator[None]:
    """While this is open, what is computed from a dataset is not written into its folder.

    This folder is an artifact of another step, so it must not change. TRL would write log-probabilities into it.
    """
    caching = is_caching_enabled()
    disable_caching()
    try:
        yield
    finally:
        if caching:
            enable_caching()


class ReferenceTrainer(ResumableTrainer):
    """Base class of the trainers with a reference. It must come before TRL's trainer in the list of bases.

    The rows are already tokenised; TRL has no option for them. The reference is `model` as it is now.

    Attributes:
        shortcuts: the computations that are saved.
        pairs: whether the second half of a batch has the prompts of the first half, in this order.
    """

    pairs = False

    # Set by TRL.
    beta: float

    def __init__(
        self, *, run: TrainingRun[Config], config: Config, model: PreTrainedModel | PeftModel, **kwargs: Any
    ) -> None:
        self.stage = run.stage
        self.forwards = 0 if config.precompute_ref_log_probs else 1
        reference = frozen_copy(model, needed=not config.precompute_ref_log_probs)
        self.flops = TrainingFlops.of(model)
        self.shortcuts = find_shortcuts(run, model, reference, config, self.pairs)
        super().__init__(model=model, ref_model=reference, processing_class=run.tokenizer, **kwargs)
        self._choose_branch()
        complete_reference(model)

    def _choose_branch(self) -> None:
        """Use the branch of TRL's code that never computes the logits of a whole batch, if the shortcut `unpadded` is taken.

        TRL names it after Liger, but this class does not use Liger's CUDA kernels.
        """
        self.use_liger_kernel = self.shortcuts.unpadded
        self._forward_redirection = _ForwardRedirection()

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL calls this in its constructor. The reference must already be computed as the policy is in training.
        assert isinstance(self.model, PreTrainedModel | PeftModel)
        complete_reference(self.model)
        self._choose_branch()
        with self.accelerator.autocast():
            rows: Dataset = super()._precompute_ref_logps(dataset, *args, **kwargs)  # type: ignore[misc]
        return rows

    def _compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        # In training, accelerate converts the logits to float32. It has not wrapped the model yet, and sums of bf16
        # log-probabilities have two to three digits.
        computed = model if self.use_liger_kernel else convert_outputs_to_fp32(model)
        return super()._compute_ref_log_probs(computed, inputs)  # type: ignore[misc]

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, model_kwargs: dict[str, Any], input_ids: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Log-probabilities for TRL's branch without logits, `(rows, length - 1)`; 0 outside the answers.

        Concatenates the rows without their padding. The entropies are zeros, because they are not computed.
        """
        inner = causal_model(self.accelerator.unwrap_model(model))
        real, answered = model_kwargs["attention_mask"].bool(), completion_mask.bool()
        order, computed = torch.arange(len(real), device=real.device), real
        if self.shortcuts.shares_prompts:
            # Each rejected answer comes after the chosen answer of its pair, and leaves out their prompt.
            order = order.view(2, -1).t().flatten()
            real, answered, input_ids = real[order], answered[order], input_ids[order]
            computed = real.clone()
            computed[1::2] = answered[1::2]
        lengths = {}
        if self.shortcuts.by_row:
            lengths["row_lengths"] = computed.sum(dim=1).tolist()
            lengths["shared_lengths"] = (real & ~computed).sum(dim=1).tolist()
        places = (computed.flatten().cumsum(dim=0) - 1).view_as(real)
        # The prompt of a row that leaves it out is at the same places of the row before.
        places = places.where(computed, places.roll(1, dims=0))
        with self.accelerator.autocast():
            outputs = inner.base_model(
                input_ids=input_ids[computed].unsqueeze(0),
                position_ids=(real.cumsum(dim=1) - 1)[computed].unsqueeze(0),
                use_cache=False,
                **lengths,
            )
            answered[:, 0] = False
            # The position before a token predicts it. It is in the same row, because each row starts with its prompt.
            before = places.roll(1, dims=1)[answered]
            head = inner.get_output_embeddings().weight
            answer_log_probs = token_log_probs(outputs.last_hidden_state[0, before], head, input_ids[answered])
        log_probs = answer_log_probs.new_zeros(answered.shape).masked_scatter(answered, answer_log_probs)[:, 1:]
        log_probs = log_probs[order.argsort()]
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
            trained = inputs["completion_mask"]
            shared = (mask - trained)[len(mask) // 2 :].sum(dim=1).tolist() if self.shortcuts.shares_prompts else []
            self.count(mask.sum(dim=1).tolist(), int(trained.sum()), computed, shared)
        result = super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]
        if self.use_liger_kernel:
            self._metrics["train" if training else "eval"].pop("entropy", None)
        if training and self.state.global_step == 0:
            self._check_start(inputs)
        return result

    def _check_start(self, inputs: dict[str, Any]) -> None:
        """Check the rewards of a batch of the first step, with `_check_reward`."""
        raise NotImplementedError

    def _check_reward(self, name: str, reward: float, tokens: float) -> None:
        """Check a reward of the first step, a mean over the rows of a batch. `tokens` is the length of an answer.

        Raises:
            WorkError: it is not 0, so policy and reference differ.
        """
        half = self.args.bf16 or self.args.fp16
        if abs(reward) > self.beta * tokens * (_ROUNDED if half else _SUMMED):
            raise WorkError(
                f"{self.stage.upper()} starts from its reference, so the {name} of the first step must be 0, and it is {reward:.4g}: "
                "policy and reference are not computed alike. Use --set compute.dtype=float32 or "
                f"--set {self.stage}.precompute_ref_log_probs=false; if the error stays, this model cannot be trained with "
                f"{self.stage.upper()} here."
            )
