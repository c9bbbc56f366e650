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
    """What SFT and DPO have in common. Names and meanings are those of transformers.TrainingArguments.

    `optim: auto` is 8-bit AdamW on CUDA where bitsandbytes is installed, else torch's. `load_best` ends with the
    checkpoint of the lowest validation loss, `early_stopping_patience` stops that many evaluations after it.
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
            raise ValueError("max_steps is 0: nothing would be trained. -1 trains num_train_epochs")
        if self.load_best and self.save_steps % self.eval_steps:
            raise ValueError(
                f"load_best keeps the checkpoint with the lowest validation loss, so save_steps ({self.save_steps}) has "
                f"to be a multiple of eval_steps ({self.eval_steps})"
            )
        if self.early_stopping_patience is not None and not self.load_best:
            raise ValueError(
                "early_stopping_patience ends training some evaluations after the best one: set load_best to true, or "
                "the worse model of the end is kept"
            )
        return self


Method = Literal["full", "lora", "qlora"]


class LoraConfig(Block):
    """The adapter. Names and meanings are those of peft.LoraConfig.

    `use_rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), which keeps large r useful;
    `use_dora` learns magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353), slower and a little better.
    """

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


class SFTConfig(TrainConfig):
    """Supervised fine-tuning with TRL's SFTTrainer.

    `method` is also what DPO goes on with: `full` trains all weights, `lora` an adapter (the block `lora`), `qlora` an
    adapter on a base model in 4 bits (nf4), which needs CUDA. `train_sampling_strategy: group_by_length` puts rows of
    about one length into a batch, so that less is padded, where rows are not packed.
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


# TRL 1.14's losses of a pair. Its `sft` is none: it leaves the rejected answer out.
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

    `precompute_ref_log_probs` asks the reference once, before training, and saves its part of every step.
    """

    beta: float = Field(0.1, gt=0)
    loss_type: DPOLoss = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    precompute_ref_log_probs: bool = False

    @model_validator(mode="after")
    def _loss(self) -> Self:
        smoothed, named = ("robust", "exo_pair", "aot", "aot_unpaired"), self.loss_type
        if self.label_smoothing > 0 and named not in smoothed:
            raise ValueError(
                f"label_smoothing has no effect with loss_type {named}: it belongs to {', '.join(smoothed)}"
            )
        if self.label_smoothing == 0 and named in ("robust", "exo_pair"):
            usual = "0.1, the share of wrong labels" if named == "robust" else "1e-3"
            raise ValueError(f"loss_type {named} needs label_smoothing above 0, e.g. {usual}")
        if named in ("aot", "aot_unpaired") and self.per_device_train_batch_size == 1:
            raise ValueError(
                f"loss_type {named} compares the sorted pairs of a batch: per_device_train_batch_size must be above 1"
            )
        return self


class TrackingConfig(Block):
    """Where metrics go: to Comet, and to what `report_to` names besides (names as transformers has them)."""

    comet: Literal["auto", "offline", "off"] = "auto"
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    project_name: str = "llm-engineering"
    workspace: str | None = None


class TrainingSetup(Block):
    """What a training or evaluation run needs to know besides its own block."""

    model: ModelConfig
    method: Method = "lora"
    max_length: int
    chat_template: str | None = None
    train_on_prompt: bool = False
    compute: ComputeConfig
    tracking: TrackingConfig
    seed: int
