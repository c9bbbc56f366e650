"""The recipe's blocks about training: the base model, the stages, the adapter, and where metrics go.

Field names follow TRL, PEFT and transformers, so that a recipe reads like their documentation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.library_fields import LibraryBlock, checked, fields_of

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"


class ModelConfig(Block):
    """The base model and how it is loaded.

    `eos_token` is the token that ends an answer, if it is neither the tokenizer's own nor the special token that the chat
    template writes after an answer, which is found without this key.

    `new_tokens` and `new_special_tokens` are added to the tokenizer, and get a row in the embeddings that is trained. A row
    starts as the mean of the rows of the tokens that spelt the word before. The data may spell `new_tokens`. Special tokens
    belong to the chat template: a row of the data that spells one is set aside, and answers are shown without them.
    """

    name_or_path: str = EMBEDDED_MODEL
    revision: str | None = None
    trust_remote_code: bool = False
    eos_token: str | None = None
    new_tokens: list[str] = Field(default_factory=list)
    new_special_tokens: list[str] = Field(default_factory=list)

    @property
    def added_tokens(self) -> list[str]:
        """All tokens that are added to the tokenizer, in the order of their ids."""
        return [*self.new_tokens, *self.new_special_tokens]

    @model_validator(mode="after")
    def _tokens(self) -> Self:
        for token in self.added_tokens:
            if not token or token != token.strip():
                raise ValueError(
                    f"the new token {token!r} is empty, or begins or ends with white space: write it without spaces around it"
                )
            if self.added_tokens.count(token) > 1:
                raise ValueError(f"the new token {token} is named twice: remove one of them")
        return self


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
    "push_to_hub": _HUB,
    "hub_token": "HF_TOKEN in .env is the token, and a recipe holds no secret",
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
# Fields that both SFTConfig and DPOConfig of TRL have.
_REFUSED_TRL = {
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


Method = Literal["full", "lora", "qlora"]


_SAVED_WITH_ADAPTER = "the project writes it when it saves the adapter"
_OWN_DATA = (
    "its start values come from activations or gradients on data, which no stage computes before training; "
    "init_lora_weights pissa and olora need only the weights"
)
_QUANTISES = "it quantises the base model itself; sft.method qlora trains on a base model in 4 bits"
_OWN_LOSS = "its regularisation is a second loss, which the trainers do not add"
_SHARED_BIAS = (
    "it trains the biases of the base model, which the base model, the reference and the adapters share; lora_bias trains "
    "biases of the adapter"
)

# Values of `init_lora_weights` that move a part of the base weights into the adapter.
_MOVING_INITS = ("pissa", "olora")


class LoraConfig(LibraryBlock):
    """The LoRA adapter. Names and meanings are those of peft.LoraConfig.

    `use_rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), so that a large r helps. `use_dora`
    learns magnitude and direction separately (Liu et al. 2024, arXiv:2402.09353): slower, and a little better.

    Every other field of PEFT's class can be set too, by its name; the fields that would give a wrong model here are
    refused with the reason. With `init_lora_weights` `pissa`, `pissa_niter_N` or `olora`, the saved adapter is converted:
    it has twice the rank, and works on the unchanged base model.
    """

    config_class = "peft.LoraConfig"
    refused: ClassVar[dict[str, str]] = {
        "task_type": "every model here is a causal language model",
        "peft_type": "this block is for LoRA only",
        "auto_mapping": _SAVED_WITH_ADAPTER,
        "peft_version": _SAVED_WITH_ADAPTER,
        "base_model_name_or_path": "model.name_or_path names the base model",
        "revision": "model.revision names the revision of the base model",
        "inference_mode": "SFT and DPO train the adapter, and evaluation does not",
        "fan_in_fan_out": "PEFT sees from a layer's class how its weights are stored",
        "layer_replication": "it changes the layers of the base model, which evaluation and merging load unchanged; use a "
        "base model that has the layers",
        "runtime_config": "models are loaded whole onto their device, so nothing is offloaded",
        "megatron_config": "no model here has layers of Megatron",
        "megatron_core": "no model here has layers of Megatron",
        "loftq_config": _QUANTISES,
        "use_qalora": "PEFT has it for GPTQ models only; sft.method qlora trains on a base model in 4 bits",
        "qalora_group_size": "it belongs to use_qalora, which PEFT has for GPTQ models only",
        "eva_config": _OWN_DATA,
        "corda_config": _OWN_DATA,
        "lora_ga_config": _OWN_DATA,
        "monteclora_config": _OWN_LOSS,
        "kasa_config": f"{_OWN_LOSS}, and it cuts the base weights, which other adapters share",
        "arrow_config": "it routes between other trained adapters, and a run trains one adapter",
        "alora_invocation_tokens": "an adapter that is active in a part of the row cannot be merged, and the trainers join "
        "rows without padding",
    }
    refused_values: ClassVar[dict[str, dict[str, str]]] = {
        "bias": {"all": _SHARED_BIAS, "lora_only": _SHARED_BIAS},
        "init_lora_weights": {
            "eva": _OWN_DATA,
            "corda": _OWN_DATA,
            "lora_ga": _OWN_DATA,
            "loftq": _QUANTISES,
        },
    }

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] | None = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def moves_base_weights(self) -> bool:
        """Whether PEFT moves a part of the base weights into the fresh adapter (PiSSA, OLoRA)."""
        return str(self.library_arguments.get("init_lora_weights")).startswith(_MOVING_INITS)

    @property
    def beyond_unsloth(self) -> list[str]:
        """The keys that this block sets and that unsloth does not have."""
        return beyond_unsloth(self.model_dump())

    @model_validator(mode="after")
    def _together(self) -> Self:
        more = self.library_arguments
        init = more.get("init_lora_weights", True)
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in (more.get(name) or {}).items():
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{name}: {key} is {value!r}: it must be a whole number of at least 1")
        if more.get("layers_to_transform") is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform needs target_modules as a list of module names, e.g. [q_proj, v_proj]"
            )
        if more.get("layers_pattern") and more.get("layers_to_transform") is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: set both, or remove it")
        variants = [name for name in ("use_dora", "velora_config", "use_bdlora") if getattr(self, name, None)]
        variants += ["init_lora_weights mica"] if init == "mica" else []
        if len(variants) > 1:
            raise ValueError(f"{' and '.join(variants)} cannot be combined: keep one of them")
        if self.moves_base_weights:
            for name in ("use_dora", "use_bdlora", "target_parameters"):
                if getattr(self, name, None):
                    raise ValueError(
                        f"init_lora_weights {init} with {name} cannot be converted to an adapter for the unchanged base "
                        f"model: remove one of them"
                    )
        if more.get("lora_bias") and not isinstance(init, bool):
            raise ValueError(f"lora_bias has no start value with init_lora_weights {init}: remove one of them")
        if more.get("lora_bias") and variants:
            raise ValueError(f"lora_bias does not work with {variants[0]}: remove one of them")
        if more.get("target_parameters"):
            for name in ("lora_dropout", "lora_bias", *variants):
                if name in variants or getattr(self, name, None):
                    raise ValueError(f"target_parameters does not work with {name}: remove one of them")
        if init == "orthogonal" and any(rank % 2 for rank in (self.r, *(more.get("rank_pattern") or {}).values())):
            raise ValueError("init_lora_weights orthogonal needs even ranks: change r, or rank_pattern")
        if (more.get("velora_config") or {}).get("init_type") == "batch_average_once":
            raise ValueError(
                "velora_config.init_type batch_average_once cannot be resumed, because PEFT does not save whether the "
                "average was taken: use batch_average, or random"
            )
        if more.get("ensure_weight_tying") and not (more.get("modules_to_save") or more.get("trainable_token_indices")):
            raise ValueError(
                "ensure_weight_tying ties the trained copies of modules_to_save, or trainable_token_indices: set one of "
                "them, or remove it"
            )
        return self


def beyond_unsloth(adapter: dict[str, Any]) -> list[str]:
    """The keys that unsloth does not have, of those that an adapter's block or its `adapter_config.json` sets."""
    defaults = {"use_dora": False, **{name: schema.get("default") for name, schema in LoraConfig.allowed().items()}}
    named = [name for name, default in defaults.items() if adapter.get(name) not in (None, default, [], {})]
    return named if adapter["target_modules"] is not None else [*named, "target_modules"]


class TrainConfig(LibraryBlock):
    """The keys that all stages share. Names and meanings are those of transformers.TrainingArguments.

    Every other field of the stage's TRL class can be set too, by its name; the keys that the project sets itself are
    refused with the reason.

    `method` and `lora` belong to the first stage of `chain`, because the later stages train its weights further. `full`
    trains all weights, `lora` (the default) an adapter, `qlora` an adapter on a base model in 4 bits (nf4), which needs
    CUDA.

    `optim: auto` is 8-bit AdamW on CUDA if bitsandbytes is installed, else torch's AdamW. With `load_best`, or
    `load_best_model_at_end`, the result is the evaluated step with the lowest validation loss; each evaluation that is the
    best so far writes a checkpoint. `early_stopping_patience` is the number of evaluations without a lower loss after which training stops. `warmup_steps` takes the place of
    `warmup_ratio`. With `eval_strategy: epoch` or `save_strategy: epoch` the number of steps is left out.
    """

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


# Fields of trl.SFTConfig that the project sets, for the stages that train with TRL's SFTTrainer.
_REFUSED_SFT = {
    **_REFUSED_TRL,
    "chat_template_path": "formatting.chat_template is the template of every stage",
    "dataset_text_field": "formatting tokenises the rows before training",
    "dataset_kwargs": "formatting tokenises the rows before training",
    "eos_token": "model.eos_token names the token that ends an answer",
    "shuffle_dataset": "rows are drawn in the order of the seed",
    "packing_strategy": "rows are packed by best-fit decreasing, which keeps every row whole",
    "eval_packing": "validation rows are not packed, so that the loss does not depend on it",
    "completion_only_loss": "formatting.train_on_prompt says what is trained",
    "assistant_only_loss": "formatting.train_on_prompt says what is trained",
    "loss_type": "the loss is the likelihood of the trained tokens, computed from hidden states",
}


class PackedConfig(TrainConfig):
    """The keys of the stages that train with TRL's SFTTrainer.

    `train_sampling_strategy: group_by_length` puts rows of similar length into one batch, which saves padding if rows
    are not packed.
    """

    config_class = "trl.SFTConfig"
    refused: ClassVar[dict[str, str]] = _REFUSED_SFT

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


class CPTConfig(PackedConfig):
    """Continued pre-training with TRL's SFTTrainer: every token of the documents is trained.

    `embedding_learning_rate` is the learning rate of the input and output embeddings where they are trained, which is
    with method `full`, or with `lora.modules_to_save`. They need a smaller rate than the adapter: 2 to 10 times smaller
    is usual. Null gives them the rate of all weights.
    """

    refused: ClassVar[dict[str, str]] = {
        **_REFUSED_SFT,
        "eos_token": "model.eos_token names the token that ends a document",
        "completion_only_loss": "every token of a document is trained",
        "assistant_only_loss": "every token of a document is trained",
    }

    embedding_learning_rate: float | None = Field(None, gt=0)


class SFTConfig(PackedConfig):
    """Supervised fine-tuning with TRL's SFTTrainer: the answers are trained."""


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
    """Direct preference optimisation with TRL's DPOTrainer; the reference is the model that the stage starts from.

    With `precompute_ref_log_probs` the reference runs once before training, instead of in every step. `sft_weight` adds
    the SFT loss of the chosen answers with this weight (Pang et al. 2024, arXiv:2404.19733). Without it, a chosen answer
    that the model would never give stays improbable: DPO is content when the rejected one becomes less probable still.
    """

    config_class = "trl.DPOConfig"
    refused: ClassVar[dict[str, str]] = {
        **_REFUSED_TRL,
        "disable_dropout": "policy and reference run without dropout, so that only their weights differ",
        "loss_weights": "a run has one loss, loss_type, to which sft_weight adds the SFT loss",
        "train_sampling_strategy": "pairs are drawn at random",
    }

    beta: float = Field(0.1, gt=0)
    loss_type: DPOLoss = "sigmoid"
    sft_weight: float = Field(0.0, ge=0)
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
