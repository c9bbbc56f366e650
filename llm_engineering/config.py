"""The recipe: one YAML file that describes the whole chain, from documents to promotion.

Field names follow TRL, PEFT and transformers, so that a recipe reads like their documentation.
A key that no code reads cannot exist here: unknown keys are refused, and every field is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
EMBEDDED_DOCUMENTS = "embedded:python-reference"
# An instruction as JSON, with its braces and its key, does not fit into fewer tokens.
MIN_JSON_TOKENS = 64

PartT = TypeVar("PartT", bound="Block")


class Block(BaseModel):
    """A part of the recipe. Frozen, so that a step cannot change what a later step sees."""

    # YAML has infinities and NaN, no number of a recipe may be one: NaN passes every comparison check.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class Prices(Block):
    """What an endpoint charges, in US dollars for a million tokens."""

    input_per_million: float = Field(ge=0)
    output_per_million: float = Field(ge=0)


class ClientConfig(Block):
    """Which model writes, and how it is reached: in this process, over an OpenAI-compatible endpoint, or Bedrock.

    The keys after `batch_size` are for endpoints. `response_format` says how an answer is made to be one text and
    nothing else: by a JSON schema that the endpoint keeps to, by one that the prompt shows, or not at all, for small
    models that cannot write JSON. `max_total_tokens` and `max_cost_usd` hold for each dataset that is
    generated; answers that it takes from the store count too.
    """

    client: Literal["local", "openai", "bedrock"] = "local"
    batch_size: int = Field(16, ge=1)
    model: str | None = None
    base_url: str | None = None
    response_format: Literal["json_schema", "prompt", "text"] = "json_schema"
    temperature: float | None = Field(None, ge=0, le=2)
    concurrency: int = Field(8, ge=1)
    timeout_s: float = Field(60.0, gt=0)
    max_retries: int = Field(5, ge=0)
    max_total_tokens: int | None = Field(None, ge=1)
    max_cost_usd: float | None = Field(None, gt=0)
    prices: Prices | None = None

    @model_validator(mode="after")
    def _client(self) -> Self:
        if self.client == "local":
            for name in sorted(ClientConfig.model_fields.keys() - {"client", "batch_size"}):
                if getattr(self, name) != ClientConfig.model_fields[name].default:
                    raise ValueError(f"{name} has no effect with client local: remove it, or choose another client")
            return self
        if not self.model:
            raise ValueError(f"client {self.client} needs `model`, the name that the endpoint knows the model by")
        if self.client == "bedrock" and self.base_url is not None:
            raise ValueError("base_url belongs to client openai: boto3 knows Bedrock's address by the AWS region")
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError(f"base_url {self.base_url} is no address such as http://127.0.0.1:8000/v1")
            if url.username or url.password or url.query:
                raise ValueError("base_url may hold no password and no query: a key belongs in OPENAI_API_KEY")
        if self.max_cost_usd is not None and self.prices is None:
            raise ValueError("max_cost_usd needs `prices`: nothing else says what a token costs")
        return self


Style = Literal["question", "task", "how_to"]


class InstructionWriting(Block):
    """How passages become instruction rows: what is written for each, and who writes the answer.

    `styles` are weights; a style is drawn for each passage, with the seed. With `answers: document` the passage is the
    answer, word for word; with `model` the client writes one from the passage.
    """

    question_max_new_tokens: int = Field(32, ge=1)
    styles: dict[Style, Annotated[float, Field(ge=0)]] = {"question": 1.0}
    answers: Literal["document", "model"] = "document"
    answer_max_new_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _writing(self) -> Self:
        if not sum(self.styles.values()):
            raise ValueError("styles has no weight above 0: nothing would be asked for, e.g. {question: 1}")
        if self.answers == "document" and self.answer_max_new_tokens is not None:
            raise ValueError("answer_max_new_tokens has no effect with answers document: remove it")
        if self.answers == "model" and self.answer_max_new_tokens is None:
            raise ValueError("answers model needs answer_max_new_tokens, e.g. 512")
        return self


class PreferenceWriting(Block):
    """How instruction rows become pairs: who writes the rejected answer, the base model or the client."""

    rejected_by: Literal["base", "client"] = "base"
    rejected_max_new_tokens: int = Field(64, ge=1)
    rejected_temperature: float = Field(1.0, ge=0)
    max_preferences: int | None = Field(None, ge=1)


class GenerationConfig(ClientConfig, InstructionWriting, PreferenceWriting):
    """How datasets are written from documents. The three parts are separate, so that a step gets what it uses."""

    @model_validator(mode="after")
    def _rejected_by(self) -> Self:
        if self.rejected_by == "client" and self.client == "local":
            raise ValueError("rejected_by client is for endpoints: client local is the base model already, say base")
        return self

    @property
    def rejecting_client(self) -> ClientConfig:
        """The client that writes the rejected answers."""
        return ClientConfig(batch_size=self.batch_size) if self.rejected_by == "base" else self.part(ClientConfig)

    def part(self, block: type[PartT]) -> PartT:
        """One of the three parts alone."""
        return block.model_validate(self.model_dump(include=set(block.model_fields)))


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
    columns: dict[str, str] = {}
    rules: RulesConfig = RulesConfig()
    near_duplicate_threshold: float = Field(0.8, gt=0, lt=1)
    decontaminate_against: list[str] = []
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


class JudgeConfig(ClientConfig):
    """The model that judges pairs of answers, reached as `generation` reaches its writer; always at temperature 0."""

    max_new_tokens: int = Field(64, ge=16)

    @model_validator(mode="after")
    def _greedy(self) -> Self:
        if self.temperature is not None:
            raise ValueError("temperature has no effect: a judge answers at temperature 0. Remove it")
        return self


class LmEvalConfig(Block):
    """Tasks of lm-eval by name, from the library or from the YAML files in the folder `include_path`.

    Names and meanings are those of lm_eval.simple_evaluate.
    """

    tasks: list[str] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    include_path: str | None = None
    apply_chat_template: bool = True


class EvaluationConfig(Block):
    """Held-out measures, each with a bootstrap interval over rows.

    `generated_rows` held-out rows, drawn with the seed, are answered by every model, and the first `sample_answers` of
    them are shown. `checks` is a JSONL file of prompts with what their answers must be like.
    """

    batch_size: int = Field(8, ge=1)
    sample_answers: int = Field(20, ge=1)
    generated_rows: int = Field(20, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, ge=0.5, lt=1)
    judge: JudgeConfig | None = None
    lm_eval: LmEvalConfig | None = None
    checks: str | None = None

    @model_validator(mode="after")
    def _shown(self) -> Self:
        if self.sample_answers > self.generated_rows:
            raise ValueError(
                f"sample_answers ({self.sample_answers}) is larger than generated_rows ({self.generated_rows}): only "
                "answers that are generated can be shown"
            )
        return self

    def computes(self, measure: str) -> bool:
        """Whether this evaluation computes a measure."""
        if measure.startswith(TASK_MEASURE):
            return self.lm_eval is not None and measure.removeprefix(TASK_MEASURE) in self.lm_eval.tasks
        optional = {"checks": self.checks, "judge_win_rate": self.judge}
        return optional[measure] is not None if measure in optional else measure in MEASURES


# What the evaluation report measures, and which direction is better; None where neither is.
MEASURES: dict[str, Literal["lower", "higher"] | None] = {
    "heldout_loss": "lower",
    "perplexity": "lower",
    "preference_accuracy": "higher",
    "preference_margin": "higher",
    "rouge_l": "higher",
    "stopped": "higher",
    "repetition": "lower",
    "length_ratio": None,
    "empty": "lower",
    "checks": "higher",
    "judge_win_rate": "higher",
}
# Of a task of lm-eval; its direction stands in the report.
TASK_MEASURE = "lm_eval_"
# Measures over pairs, which a run that ends with SFT has none of.
PAIR_MEASURES = ("preference_accuracy", "preference_margin")

Bounds = dict[str, Annotated[float, Field(ge=0)] | None]


class Comparisons(Block):
    """Bounds by the model compared with, then by measure: `{base: {heldout_loss: 0.1}}`.

    `incumbent` is the model in production. A bound of null takes an inherited rule away.
    """

    base: Bounds = {}
    sft: Bounds = {}
    incumbent: Bounds = {}


class GateRules(Block):
    """What a model must reach before it is moved to a stage, in the measures' own units.

    It must be better by more than each bound of `better_than`, and not worse by more than each bound of
    `not_worse_than`; both are judged by the end of the interval of the paired difference that speaks against it.
    """

    better_than: Comparisons
    not_worse_than: Comparisons = Comparisons()

    @model_validator(mode="after")
    def _base_and_incumbent(self) -> Self:
        # Without these an equal model would pass.
        for model in ("base", "incumbent"):
            if all(bound is None for bound in getattr(self.better_than, model).values()):
                raise ValueError(
                    f"better_than.{model} has no measure: a model must be better than {model} in at least one, "
                    f"e.g. {model}: {{heldout_loss: 0.0}}"
                )
        return self


class PromotionConfig(Block):
    """What the gate asks of a run that ends with SFT, and of one that ends with DPO; `auto` promotes to production."""

    sft: GateRules
    dpo: GateRules
    auto: bool = False

    @model_validator(mode="after")
    def _known_measures(self) -> Self:
        for path, measure in self.measures():
            if measure in MEASURES and MEASURES[measure] is None:
                raise ValueError(f"{path}: neither more nor less {measure} is better, so no rule can be made of it")
            if measure not in MEASURES and not measure.startswith(TASK_MEASURE):
                near = get_close_matches(measure, MEASURES, n=1, cutoff=0.5)
                known = f"did you mean {near[0]}?" if near else f"there are {', '.join(MEASURES)} and lm_eval_<task>"
                raise ValueError(f"{path}: there is no measure {measure}; {known}")
            if path.startswith("sft.") and measure in PAIR_MEASURES:
                raise ValueError(
                    f"{path}: a run that ends with SFT has no held-out pairs to measure {measure} on; "
                    f"ask for it in promotion.dpo"
                )
        if self.sft.better_than.sft or self.sft.not_worse_than.sft:
            raise ValueError("sft: a run that ends with SFT has no other SFT model to compare with: remove its key sft")
        return self

    def measures(self) -> Iterator[tuple[str, str]]:
        """Every measure that a rule names, with the path of the rule."""
        for run in ("sft", "dpo"):
            for sense in ("better_than", "not_worse_than"):
                comparisons: Comparisons = getattr(getattr(self, run), sense)
                for model in Comparisons.model_fields:
                    for measure, bound in getattr(comparisons, model).items():
                        if bound is not None:
                            yield f"{run}.{sense}.{model}", measure


class ComputeConfig(Block):
    """Where training runs, in which precision, in how many processes, and what loads the model that is trained.

    On CUDA each of the `num_processes` has a card of its own. `distributed` is what they share: with `ddp` each holds
    the whole model and they average gradients; `fsdp2` shards weights, gradients and optimiser state over them;
    `deepspeed` shards what `zero_stage` says (1 the optimiser state, 2 gradients too, 3 weights too).

    `backend: auto` is unsloth where CUDA and the package are there and the recipe asks for nothing that it lacks, else
    transformers.
    """

    target: Literal["local"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    backend: Literal["auto", "transformers", "unsloth"] = "auto"
    num_processes: int = Field(1, ge=1)
    distributed: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    zero_stage: Literal[1, 2, 3] | None = None

    @model_validator(mode="after")
    def _processes(self) -> Self:
        if self.distributed != "ddp" and self.num_processes == 1:
            raise ValueError(
                f"distributed {self.distributed} has no effect with num_processes 1: remove it, or set num_processes"
            )
        if self.distributed != "ddp" and self.device == "cpu":
            raise ValueError(f"distributed {self.distributed} needs CUDA: use ddp with device cpu")
        if self.distributed == "deepspeed" and self.zero_stage is None:
            raise ValueError("distributed deepspeed needs zero_stage: 1, 2 or 3, which shards the weights too")
        if self.distributed != "deepspeed" and self.zero_stage is not None:
            raise ValueError(f"zero_stage has no effect with distributed {self.distributed}: remove it")
        return self

    @property
    def one_process(self) -> ComputeConfig:
        """What work in a single process depends on, so that it is not repeated when training gets more of them."""
        return self.model_copy(update={"num_processes": 1, "distributed": "ddp", "zero_stage": None})


class TrackingConfig(Block):
    """Where metrics go: to Comet, and to what `report_to` names besides (names as transformers has them)."""

    comet: Literal["auto", "offline", "off"] = "auto"
    report_to: list[Literal["tensorboard", "wandb"]] = []
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
