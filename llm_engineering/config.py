"""The recipe: one YAML file that describes the whole chain, from documents to promotion.

Field names follow TRL, PEFT and transformers, so that a recipe reads like their documentation.
A key that no code reads cannot exist here: unknown keys are refused, and every field is used.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

# `as`: the recipe's blocks are imported from here, wherever they are written down.
from llm_engineering.config_compute import ComputeConfig as ComputeConfig
from llm_engineering.config_compute import SageMakerConfig as SageMakerConfig
from llm_engineering.config_evaluation import EvaluationConfig as EvaluationConfig
from llm_engineering.config_evaluation import JudgeConfig as JudgeConfig
from llm_engineering.config_evaluation import LmEvalConfig as LmEvalConfig
from llm_engineering.config_evaluation import PromotionConfig as PromotionConfig
from llm_engineering.config_generation import MIN_JSON_TOKENS
from llm_engineering.config_generation import Block as Block
from llm_engineering.config_generation import ClientConfig as ClientConfig
from llm_engineering.config_generation import GenerationConfig as GenerationConfig
from llm_engineering.config_generation import InstructionWriting as InstructionWriting
from llm_engineering.config_generation import PreferenceWriting as PreferenceWriting
from llm_engineering.config_generation import Style as Style

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
EMBEDDED_DOCUMENTS = "embedded:python-reference"


class ModelConfig(Block):
    """The base model and how it is loaded."""

    name_or_path: str = EMBEDDED_MODEL
    revision: str | None = None
    trust_remote_code: bool = False


class DocumentsConfig(Block):
    """Where text comes from, and how it is cut into passages."""

    path: str = EMBEDDED_DOCUMENTS
    text_field: str | None = None
    passage_min_chars: int = Field(200, ge=1)
    passage_max_chars: int = Field(500, ge=20)
    max_passages: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.passage_min_chars > self.passage_max_chars:
            raise ValueError(
                f"passage_min_chars ({self.passage_min_chars}) is larger than passage_max_chars "
                f"({self.passage_max_chars}): no passage could be kept"
            )
        return self


class SplitConfig(Block):
    """Shares of the held-out splits; the rest is trained on."""

    validation_fraction: float = Field(0.1, gt=0, lt=1)
    test_fraction: float = Field(0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction ({self.validation_fraction}) and test_fraction ({self.test_fraction}) "
                "leave no row to train on: their sum must be below 1"
            )
        return self


# What happens to rows that a rule matches. `report` keeps them and lists them; `drop_generated` drops those that a
# model wrote and reports the others.
Action = Literal["off", "report", "drop", "drop_generated"]
PrivateAction = Literal["off", "report", "mask", "drop"]


class RulesConfig(Block):
    """The checks of the data, each with what happens to the rows it matches."""

    empty_answer: Action = "drop"
    chosen_equals_rejected: Action = "drop"
    exact_duplicate: Action = "drop"
    near_duplicate: Action = "drop"
    refusal: Action = "drop_generated"
    truncated_answer: Action = "drop_generated"
    mentions_passage: Action = "drop_generated"
    conflicting_answers: Action = "report"
    language_outlier: Action = "report"
    length_outlier: Action = "report"
    personal_data: PrivateAction = "report"
    secret: PrivateAction = "report"


# The formats of instruction and of preference datasets, as llm_engineering.data.formats reads them.
FormatName = Literal[
    "alpaca",
    "alpaca-response",
    "alpaca-answer",
    "dolly",
    "messages",
    "sharegpt",
    "prompt-completion",
    "text-alpaca",
    "text-human-assistant",
    "text-inst",
    "prompt-chosen-rejected",
    "chosen-rejected",
    "sharegpt-preference",
    "alpaca-preference",
]


class HubConfig(Block):
    """How `make push-dataset` publishes the datasets on the Hugging Face Hub.

    `license` is the hub's short name of the data's licence (e.g. `cc-by-4.0`; `other` if it has none): nobody but the
    owner of the data can know it, so it has no default.
    """

    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")
    instruction_repo_id: str | None = None
    preference_repo_id: str | None = None
    private: bool = True

    @model_validator(mode="after")
    def _one_repo_each(self) -> Self:
        if self.instruction_repo_id is not None and self.instruction_repo_id == self.preference_repo_id:
            raise ValueError("instruction_repo_id and preference_repo_id are the same: one would overwrite the other")
        return self


class ModelHubConfig(Block):
    """How `make push-model` publishes the model on the Hugging Face Hub.

    `license` is the hub's short name of the licence that the model gets, `base_license` that of its base model: it
    is known of the embedded one only.
    """

    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    base_license: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.-]*$")
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")
    repo_id: str | None = None
    private: bool = True


class DataConfig(Block):
    """The user's own datasets instead of generated ones, and how rows are checked and split.

    A dataset is a file, a folder that `datasets` saved, or a hub id; `#name` behind it names one of several splits.
    """

    instructions: str | None = None
    preferences: str | None = None
    test_instructions: str | None = None
    test_preferences: str | None = None
    format: FormatName | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    rules: RulesConfig = RulesConfig()
    near_duplicate_threshold: float = Field(0.8, gt=0, lt=1)
    decontaminate_against: list[str] = Field(default_factory=list)
    decontaminate_ngram: int = Field(13, ge=1)
    strict: bool = False
    split: SplitConfig = SplitConfig()
    hub: HubConfig | None = None

    @property
    def checks(self) -> DataConfig:
        """The part that decides what becomes of rows, wherever they are read from."""
        sources = ("instructions", "preferences", "test_instructions", "test_preferences", "format", "columns", "hub")
        return DataConfig.model_validate(self.model_dump(exclude=set(sources)))

    @model_validator(mode="after")
    def _own_test_split(self) -> Self:
        for kind in ("instructions", "preferences"):
            if getattr(self, f"test_{kind}") is not None and getattr(self, kind) is None:
                raise ValueError(
                    f"test_{kind} is set, but {kind} is not: a test split goes with a dataset of one's own"
                )
        return self


class FormattingConfig(Block):
    """How rows become token ids.

    `chat_template` is null for the model's own, a name (`alpaca`, `chatml`, `human_assistant`, `llama3`), or the path of
    a Jinja file. What is too long is dropped, cut (`truncate`: the end of turn is then not trained), or an error.
    `train_on_prompt` trains every token of a row; the held-out loss stays that of the answers.
    """

    max_length: int = Field(512, ge=8)
    over_long: Literal["drop", "truncate", "raise"] = "drop"
    chat_template: str | None = None
    train_on_prompt: bool = False


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


class Recipe(Block):
    """The whole chain."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")
    seed: int = Field(42, ge=0)
    model: ModelConfig = ModelConfig()
    documents: DocumentsConfig = DocumentsConfig()
    generation: GenerationConfig = GenerationConfig()
    data: DataConfig = DataConfig()
    formatting: FormattingConfig = FormattingConfig()
    sft: SFTConfig
    dpo: DPOConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    hub: ModelHubConfig | None = None

    @property
    def setup(self) -> TrainingSetup:
        """The part of the recipe that both training stages share."""
        return TrainingSetup(
            model=self.model,
            method=self.sft.method,
            max_length=self.formatting.max_length,
            chat_template=self.formatting.chat_template,
            train_on_prompt=self.formatting.train_on_prompt,
            compute=self.compute,
            tracking=self.tracking,
            seed=self.seed,
        )

    @property
    def evaluation_setup(self) -> TrainingSetup:
        """The same for evaluation, which is one process, here, wherever training runs."""
        return self.setup.model_copy(update={"compute": self.compute.one_process})

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        writing = self.generation
        writes_json = writing.client != "local" and writing.response_format != "text"
        if writes_json and self.data.instructions is None:
            if writing.question_max_new_tokens < MIN_JSON_TOKENS:
                raise ValueError(
                    f"generation.question_max_new_tokens {writing.question_max_new_tokens} is too few with client "
                    f"{writing.client}, which answers in JSON: at least {MIN_JSON_TOKENS}, 200 is a good value"
                )
            if writing.answer_max_new_tokens is not None and writing.answer_max_new_tokens < MIN_JSON_TOKENS:
                raise ValueError(
                    f"generation.answer_max_new_tokens {writing.answer_max_new_tokens} is too few with client "
                    f"{writing.client}, which answers in JSON: at least {MIN_JSON_TOKENS}, 512 is a good value"
                )
        for path, measure in self.promotion.measures():
            if not self.evaluation.computes(measure):
                raise ValueError(
                    f"promotion.{path} names {measure}, which the evaluation of this recipe does not compute: "
                    "ask for it in the block evaluation, or remove the rule"
                )
        if self.sft.method == "full" and self.sft.lora != LoraConfig():
            raise ValueError("sft.lora has no effect with sft.method full: remove it, or choose lora or qlora")
        if self.compute.device == "cpu" and self.compute.dtype == "float16":
            raise ValueError(
                "compute.dtype float16 does not train on compute.device cpu: use bfloat16 or float32, or auto"
            )
        if self.compute.device == "cpu" and self.compute.attn_implementation == "flash_attention_2":
            raise ValueError("compute.attn_implementation flash_attention_2 needs CUDA: use sdpa, or auto")
        compute = self.compute
        best = [stage for stage, config in (("sft", self.sft), ("dpo", self.dpo)) if config.load_best]
        if best and compute.sagemaker is not None and compute.sagemaker.instance_count > 1:
            raise ValueError(
                f"{best[0]}.load_best reads the best checkpoint in every process, and only the first of several machines "
                "has it on its disk: set it to false, or compute.sagemaker.instance_count to 1"
            )
        if self.sft.method == "qlora" and (compute.distributed == "fsdp2" or compute.zero_stage == 3):
            raise ValueError(
                "sft.method qlora keeps its weights in 4 bits, which are not sharded here: use compute.distributed ddp, "
                "or deepspeed with zero_stage 1 or 2"
            )
        for stage, optim in (("sft", self.sft.optim), ("dpo", self.dpo.optim)):
            if optim == "adamw_8bit" and compute.distributed != "ddp":
                raise ValueError(
                    f"{stage}.optim adamw_8bit has a state that is not sharded with compute.distributed "
                    f"{compute.distributed}: use auto or adamw_torch, or ddp"
                )
        if self.dpo.precompute_ref_log_probs and compute.num_processes > 1:
            raise ValueError(
                "dpo.precompute_ref_log_probs is for compute.num_processes 1: set it to false, and the reference is "
                "asked at every step"
            )
        if self.compute.backend == "unsloth" and self.compute.device == "cpu":
            raise ValueError("compute.backend unsloth needs CUDA, and compute.device is cpu: use transformers, or auto")
        if self.compute.backend == "unsloth" and self.sft.lora.use_dora:
            raise ValueError(
                "compute.backend unsloth has no kernels for sft.lora.use_dora: use transformers, or auto, or no DoRA"
            )
        if self.compute.backend == "unsloth" and self.sft.method == "full" and self.sft.packing:
            raise ValueError(
                "compute.backend unsloth trains sft.method full with a forward that is not told where packed rows begin: "
                "set sft.packing to false, or use transformers"
            )
        if self.tracking.comet != "auto" and self.tracking.workspace is not None:
            raise ValueError(
                f"tracking.workspace is only used online, and tracking.comet is {self.tracking.comet}: remove one"
            )
        return self
