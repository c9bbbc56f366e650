"""The recipe's keys that all training stages share, and where metrics go. `stage_blocks.py` has a block for each stage.

Field names follow TRL and transformers, so that a recipe reads like their documentation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm_engineering.recipe.block import Block, LibraryBlock, checked, fields_of
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig, Method, ModelConfig

_PROCESSES = "the block compute says how many processes train, and how they share the work"
_HUB = "`make push-model` publishes a model, as the block hub says"
_OWN_EVALUATION = "the project evaluates the validation split itself"
_TRACKERS = "the block tracking says where metrics go"

# Fields of transformers.TrainingArguments that the project sets, each with the reason and the place to set it.
_REFUSED_ARGUMENTS = {
    "output_dir": "the folder follows from what a run computes; LLM_OUTPUT_DIR moves all of them",
    "seed": "the recipe's top-level key seed is the seed of every stage",
    "resume_from_checkpoint": "a run resumes its newest complete checkpoint; `--resume` names another run",
    "bf16": "compute.dtype chooses the precision",
    "fp16": "compute.dtype chooses the precision",
    "bf16_full_eval": "compute.dtype chooses the precision",
    "fp16_full_eval": "compute.dtype chooses the precision",
    "use_cpu": "compute.device chooses the device",
    "fsdp": _PROCESSES,
    "fsdp_config": _PROCESSES,
    "deepspeed": _PROCESSES,
    "accelerator_config": _PROCESSES,
    "parallelism_config": _PROCESSES,
    "local_rank": _PROCESSES,
    "auto_find_batch_size": "a batch that does not fit into the card's memory is halved anyway",
    "use_liger_kernel": "the loss is computed from hidden states, without the logits of a batch",
    "liger_kernel_config": "the loss is computed from hidden states, without the logits of a batch",
    "use_cache": "packed rows are kept apart only without a cache of keys and values",
    "metric_for_best_model": "the best checkpoint is that of the lowest validation loss",
    "greater_is_better": "the best checkpoint is that of the lowest validation loss",
    "save_only_model": "a checkpoint without the optimiser's state could not be resumed",
    "save_on_each_node": "the checkpoint of several machines is brought together on the first",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint anyway",
    "ignore_data_skip": "a resumed run would train some rows twice",
    "restore_callback_states_from_checkpoint": "a resumed run restores what it needs itself",
    "do_train": "the pipelines decide what runs",
    "do_eval": _OWN_EVALUATION,
    "do_predict": _OWN_EVALUATION,
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "label_names": _OWN_EVALUATION,
    "remove_unused_columns": "formatting writes the columns that the trainer reads",
    "length_column_name": "formatting writes the columns that the trainer reads",
    "label_smoothing_factor": "the loss is computed from hidden states, without the logits of a batch",
    "include_num_input_tokens_seen": "every log entry has the number of tokens",
    "report_to": _TRACKERS,
    "run_name": _TRACKERS,
    "project": _TRACKERS,
    "trackio_space_id": _TRACKERS,
    "trackio_bucket_id": _TRACKERS,
    "trackio_static_space_id": _TRACKERS,
    "disable_tqdm": "the project prints its own progress",
    "log_level": "the project prints its own progress",
    "log_level_replica": "the project prints its own progress",
    "log_on_each_node": "the project prints its own progress",
    "logging_first_step": "the first step is always logged",
    "logging_strategy": "logging_steps says how often",
    "push_to_hub": _HUB,
    "hub_token": "HF_TOKEN in .env is the token, and a recipe holds no secret",
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
# Fields of the configuration classes of TRL, of which some have not all.
REFUSED_TRL = {
    **_REFUSED_ARGUMENTS,
    "model_init_kwargs": "the blocks model and compute say how the model is loaded",
    "trust_remote_code": "model.trust_remote_code holds for every stage",
    "dataset_num_proc": "formatting tokenises the rows before training",
    "max_length": "formatting.max_length is the length of every stage",
    "truncation_mode": "formatting.over_long says what happens to rows that are too long",
    "padding_free": "rows are computed without padding wherever the model allows it",
    "pad_to_multiple_of": "rows are computed without padding wherever the model allows it",
    "activation_offloading": "it fails on a CPU, and no test here runs it on CUDA; gradient_checkpointing saves memory too",
    "pad_token": "the tokenizer's pad token is chosen when the model is loaded",
}


class TrainConfig(LibraryBlock):
    """The keys that all stages share. Names and meanings are those of transformers.TrainingArguments.

    Every other field of the stage's TRL class can be set too, by its name; the keys that the project sets itself are
    refused with the reason.

    `method` and `lora` belong to the first stage of `chain`, because the later stages train its weights further. `full`
    trains all weights, `lora` (the default) an adapter, `qlora` an adapter on a base model in 4 bits (nf4), which needs
    CUDA.

    - `optim: auto`: 8-bit AdamW on CUDA if bitsandbytes is installed, else torch's AdamW.
    - `load_best`, or `load_best_model_at_end`: the result is the evaluated step with the lowest validation loss. Each evaluation
      that is the best so far writes a checkpoint.
    - `early_stopping_patience`: training stops after this number of evaluations without a lower loss.
    - `warmup_steps` takes the place of `warmup_ratio`.
    - `eval_strategy: epoch`, `save_strategy: epoch`: the number of steps is left out.
    """

    # Whether compute.backend unsloth can train the stage.
    trains_with_unsloth: ClassVar[bool] = True

    method: Method | None = None
    lora: LoraConfig | None = None
    learning_rate: float = Field(gt=0)
    num_train_epochs: float = Field(gt=0)
    max_steps: int = Field(-1, ge=-1)
    per_device_train_batch_size: int = Field(ge=1)
    per_device_eval_batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    logging_steps: int = Field(1, ge=1)
    eval_strategy: Literal["steps", "epoch"] = "steps"
    eval_steps: int | None = Field(None, ge=1)
    save_strategy: Literal["steps", "epoch"] = "steps"
    save_steps: int | None = Field(None, ge=1)
    save_total_limit: int = Field(2, ge=1)
    optim: str = "auto"
    load_best: bool = False
    early_stopping_patience: int | None = Field(None, ge=1)

    def needs_whole_weights(self, method: Method) -> bool:
        """Whether TRL needs the whole model in every process, even if `compute` shards the weights."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _names_of_the_library(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and "load_best_model_at_end" in keys:
            if "load_best" in keys:
                raise ValueError("load_best and load_best_model_at_end are the same key: remove one of them")
            keys = {"load_best" if name == "load_best_model_at_end" else name: value for name, value in keys.items()}
        return keys

    @field_validator("lr_scheduler_type", "optim")
    @classmethod
    def _library_values(cls, value: str, info: Any) -> str:
        if (info.field_name, value) == ("optim", "auto"):
            return value
        return str(checked(value, fields_of(cls.config_class)[info.field_name]))

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0, so nothing would be trained: set -1 to train num_train_epochs")
        for name in ("eval", "save"):
            strategy, steps = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            if strategy == "steps" and steps is None:
                raise ValueError(f"{name}_steps is missing: say after how many steps, or set {name}_strategy to epoch")
            if strategy == "epoch" and steps is not None:
                raise ValueError(f"{name}_steps has no effect with {name}_strategy epoch: remove it, or set it to null")
        if self.load_best and self.eval_strategy != self.save_strategy:
            raise ValueError(
                "load_best keeps the checkpoint with the lowest validation loss: eval_strategy and save_strategy must be "
                "the same"
            )
        # A recipe that was dumped and is read again names the default too.
        default = TrainConfig.model_fields["warmup_ratio"].default
        if "warmup_steps" in self.library_arguments and self.warmup_ratio != default:
            raise ValueError("warmup_steps and warmup_ratio are both set: remove one of them")
        if "min_lr" in self.lr_scheduler_type and not self.library_arguments.get("lr_scheduler_kwargs"):
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type} needs its smallest learning rate, e.g. lr_scheduler_kwargs: "
                "{min_lr_rate: 0.1}"
            )
        layerwise = self.optim.startswith(("galore", "apollo"))
        if layerwise and not self.library_arguments.get("optim_target_modules"):
            raise ValueError(f"optim {self.optim} needs optim_target_modules, e.g. [attn, mlp]")
        if self.load_best and self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
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

    @model_validator(mode="after")
    def _quantised(self) -> Self:
        if self.method != "qlora" or self.lora is None:
            return self
        more = self.lora.library_arguments
        if self.lora.moves_base_weights:
            raise ValueError(
                f"lora.init_lora_weights {more['init_lora_weights']} changes the base weights, which method qlora keeps in 4 "
                "bits, so no adapter fits the unchanged base model: use method lora, or another start value"
            )
        for name in ("modules_to_save", "trainable_token_indices"):
            if more.get(name):
                raise ValueError(
                    f"lora.{name} with method qlora would be trained in bf16, as TRL trains all weights on a quantised base "
                    "model, and bf16 loses small updates of whole weights: use method lora, or remove it"
                )
        for name in ("target_parameters", "velora_config", "use_bdlora"):
            if more.get(name):
                raise ValueError(f"lora.{name} does not work on layers in 4 bits: use method lora, or remove it")
        if more.get("init_lora_weights") == "mica":
            raise ValueError("lora.init_lora_weights mica needs base weights of 16 bits or more: use method lora")
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
