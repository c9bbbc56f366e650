"""The recipe's blocks about training: the base model, SFT, DPO, the adapter, and where metrics go.

Field names follow TRL, PEFT and transformers, so that a recipe reads like their documentation.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.compute_blocks import ComputeConfig

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"


class ModelConfig(Block):
    """The base model and how it is loaded."""

    name_or_path: str = EMBEDDED_MODEL
    revision: str | None = None
    trust_remote_code: bool = False


class TrainConfig(Block):
    """The keys that SFT and DPO share. Names and meanings are those of transformers.TrainingArguments.

    `optim: auto` is 8-bit AdamW on CUDA if bitsandbytes is installed, else torch's AdamW. With `load_best` the result is
    the checkpoint with the lowest validation loss. `early_stopping_patience` is the number of evaluations without a lower
    loss after which training stops.
    """

    learning_rate: float = Field(gt=0)
    num_train_epochs: float = Field(gt=0)
    max_steps: int = Field(-1, ge=-1)
    per_device_train_batch_size: int = Field(ge=1)
    per_device_eval_batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    logging_steps: int = Field(1, ge=1)
    eval_steps: int = Field(ge=1)
    save_steps: int = Field(ge=1)
    optim: Literal["auto", "adamw_torch", "adamw_8bit"] = "auto"
    load_best: bool = False
    early_stopping_patience: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0, so nothing would be trained: set -1 to train num_train_epochs")
        if self.load_best and self.save_steps % self.eval_steps:
            raise ValueError(
                f"load_best keeps the checkpoint with the lowest validation loss: save_steps ({self.save_steps}) must be a "
                f"multiple of eval_steps ({self.eval_steps})"
            )
        if self.early_stopping_patience is not None and not self.load_best:
            raise ValueError(
                "early_stopping_patience stops training some evaluations after the best checkpoint: set load_best to true "
                "to keep that checkpoint and not the worse one at the end"
            )
        return self


Method = Literal["full", "lora", "qlora"]


class LoraConfig(Block):
    """The LoRA adapter. Names and meanings are those of peft.LoraConfig.

    `use_rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), so that a large r helps. `use_dora`
    learns magnitude and direction separately (Liu et al. 2024, arXiv:2402.09353): slower, and a little better.
    """

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


class SFTConfig(TrainConfig):
    """Supervised fine-tuning with TRL's SFTTrainer.

    `method` also applies to DPO: `full` trains all weights, `lora` an adapter (the block `lora`), `qlora` an adapter on a
    base model in 4 bits (nf4), which needs CUDA. `train_sampling_strategy: group_by_length` puts rows of similar length
    into one batch, which saves padding if rows are not packed.
    """

    method: Method = "lora"
    lora: LoraConfig = LoraConfig()
    packing: bool = True
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"

    @model_validator(mode="after")
    def _sampling(self) -> Self:
        if self.packing and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy {self.train_sampling_strategy} has no effect with packing, which fills every "
                "row to max_length: set packing to false, or remove it"
            )
        return self


# The pair losses of TRL 1.14. TRL's `sft` is left out: it ignores the rejected answer.
DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
]


class DPOConfig(TrainConfig):
    """Direct preference optimisation with TRL's DPOTrainer; the reference is the SFT model.

    With `precompute_ref_log_probs` the reference runs once before training, instead of in every step.
    """

    beta: float = Field(0.1, gt=0)
    loss_type: DPOLoss = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    precompute_ref_log_probs: bool = False

    @model_validator(mode="after")
    def _loss(self) -> Self:
        smoothed, loss = ("robust", "exo_pair", "aot", "aot_unpaired"), self.loss_type
        if self.label_smoothing > 0 and loss not in smoothed:
            raise ValueError(
                f"label_smoothing has no effect with loss_type {loss}: remove it, or choose {' or '.join(smoothed)}"
            )
        if self.label_smoothing == 0 and loss in ("robust", "exo_pair"):
            usual = "0.1, the share of wrong labels" if loss == "robust" else "1e-3"
            raise ValueError(f"loss_type {loss} needs label_smoothing above 0, e.g. {usual}")
        if loss in ("aot", "aot_unpaired") and self.per_device_train_batch_size == 1:
            raise ValueError(
                f"loss_type {loss} compares the sorted pairs of a batch: per_device_train_batch_size must be above 1"
            )
        return self


class TrackingConfig(Block):
    """Where metrics go: to Comet, and to the trackers in `report_to` (transformers' names)."""

    comet: Literal["auto", "offline", "off"] = "auto"
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    project_name: str = "llm-engineering"
    workspace: str | None = None


class TrainingSetup(Block):
    """The keys of other blocks that a training or evaluation run needs."""

    model: ModelConfig
    method: Method = "lora"
    max_length: int
    chat_template: str | None = None
    train_on_prompt: bool = False
    compute: ComputeConfig
    tracking: TrackingConfig
    seed: int
