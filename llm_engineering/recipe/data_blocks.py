"""The recipe's blocks about data: documents, the user's own datasets, rules, splits, formatting, the hub and the
server."""

from __future__ import annotations

from datetime import date
from typing import Literal, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block

EMBEDDED_DOCUMENTS = "embedded:python-reference"
# The handbook of an invented organisation, with an exam about it.
EMBEDDED_HANDBOOK = "embedded:handbook"

# Metadata of a data report and of a model version: why the data is not fit to train on.
UNFIT = "unfit_data"

# What people said, which rows are made of like those of a file: in `make review`, and about served answers.
REVIEW, FEEDBACK = "review", "feedback"
PEOPLE = (REVIEW, FEEDBACK)

# General questions with their answers, for `data.replay_instructions`. They are others than those of the exam's control.
EMBEDDED_GENERAL = "embedded:general"


class DocumentsConfig(Block):
    """The documents to read, and how they are cut into passages.

    `path` is a file or a folder with text, Markdown, HTML, PDF, Word, PowerPoint, EPUB, notebook, CSV or JSON files.
    `text_field` is the key or column of the text in JSON and CSV files.

    With the unit `sentence` every sentence that names something is a passage, for generated instructions and for the texts
    of continued pre-training. With `passage` the texts are whole documents.
    """

    path: str = EMBEDDED_DOCUMENTS
    text_field: str | None = None
    unit: Literal["passage", "sentence"] = "passage"
    passage_min_chars: int = Field(200, ge=1)
    passage_max_chars: int = Field(500, ge=20)
    max_passages: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.unit == "passage" and self.passage_min_chars > self.passage_max_chars:
            raise ValueError(
                f"passage_min_chars ({self.passage_min_chars}) is larger than passage_max_chars "
                f"({self.passage_max_chars}): no passage could be kept"
            )
        return self


class SplitConfig(Block):
    """Shares of the held-out splits. The rest is the training split."""

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


# What happens to a row that a rule matches. `report` keeps the row and lists it. `drop_generated` drops the row if a model
# wrote it, and reports it otherwise.
Action = Literal["off", "report", "drop", "drop_generated"]
PrivateAction = Literal["off", "report", "mask", "drop"]


class RulesConfig(Block):
    """The rules that check rows, each with the action for the rows that it matches."""

    empty_answer: Action = "drop"
    chosen_equals_rejected: Action = "drop"
    exact_duplicate: Action = "drop"
    near_duplicate: Action = "drop"
    refusal: Action = "drop_generated"
    truncated_answer: Action = "drop_generated"
    mentions_passage: Action = "drop_generated"
    order_to_model: Action = "drop_generated"
    conflicting_answers: Action = "report"
    language_outlier: Action = "report"
    length_outlier: Action = "report"
    personal_data: PrivateAction = "report"
    secret: PrivateAction = "report"


# The formats of instructions, of preferences and of prompts, as llm_engineering.data.formats reads them.
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
    "text-hh",
    "text-chatml",
    "text-llama3",
    "prompt-chosen-rejected",
    "chosen-rejected",
    "sharegpt-preference",
    "alpaca-preference",
    "openai-preference",
    "prompt",
    "question",
    "prompt-messages",
]


class HubConfig(Block):
    """How `make push-dataset` publishes the datasets on the Hugging Face Hub.

    `license` is the hub's short name of the data's licence (e.g. `cc-by-4.0`; `other` if it has none). Only the owner of
    the data knows it, so it has no default.
    """

    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")
    instruction_repo_id: str | None = None
    preference_repo_id: str | None = None
    prompt_repo_id: str | None = None
    labelled_repo_id: str | None = None
    private: bool = True

    @model_validator(mode="after")
    def _one_repo_each(self) -> Self:
        names: dict[str, str] = {}
        for key in ("instruction_repo_id", "preference_repo_id", "labelled_repo_id", "prompt_repo_id"):
            repo = getattr(self, key)
            if repo is not None and names.setdefault(repo, key) != key:
                raise ValueError(
                    f"{names[repo]} and {key} are the same, so one would overwrite the other: name two repositories"
                )
        return self


class ModelHubConfig(Block):
    """How `make push-model` publishes the model on the Hugging Face Hub.

    `license` is the hub's short name of the model's licence, `base_license` that of its base model. The licence of the
    embedded base model is known; every other base model needs `base_license`. `base_training_tokens` is the number of tokens
    that the base model was trained on: `make evidence` computes from it the operations of that training.
    """

    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    base_license: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.-]*$")
    base_training_tokens: float | None = Field(None, gt=0)
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")
    repo_id: str | None = None
    private: bool = True


class ExportConfig(Block):
    """What a quantised GGUF file may lose against the model in its own precision. A file that loses more is not kept.

    `max_logprob_loss` is in nats a token of held-out answers, and `max_exam_loss` is a share of the exam's questions about
    one fact of the documents.
    """

    max_logprob_loss: float = Field(0.1, gt=0)
    max_exam_loss: float = Field(0.1, ge=0, le=1)


class ServingConfig(Block):
    """How `make serve` serves the model.

    With `log_requests` the server writes each request and answer to `served/` in the output folder, with personal data and
    secrets masked, and takes feedback on its answers.
    """

    log_requests: bool = False


class ReplayConfig(Block):
    """Text of a general dataset that continued pre-training mixes in, so that the model forgets less.

    `path` is a dataset with a column `text`: a file, a folder that `datasets` saved, or a hub id. Its rows are taken in
    their order, until they make up `share` of the characters that are trained on. They are not held out.
    """

    path: str
    share: float = Field(0.1, gt=0, lt=1)


# The keys of the user's own rows, which have a key `test_…` beside them for a test split.
_OWN_ROWS = ("instructions", "preferences", "labelled", "prompts")


def rows_key(kind: str) -> str:
    """The name of the rows of a kind in steps and keys, e.g. `instructions`."""
    return kind if kind == "labelled" else f"{kind}s"


def file_among(sources: str | list[str] | None) -> str | None:
    """The file, folder or hub id in the value of a key such as `data.instructions`; None without one."""
    named = [sources] if isinstance(sources, str) else sources or []
    return next((source for source in named if source not in PEOPLE), None)


class DataConfig(Block):
    """The user's own datasets, which replace the generated ones, what people said, and how rows are checked and split.

    `prompts` are what the stages with rewards ask: questions, with or without accepted answers. Without a file, they are
    the questions of the instructions, whose answers are accepted.

    A dataset is a file, a folder that `datasets` saved, or a hub id; `#name` after it selects one of several splits.
    `instructions`, `preferences`, `prompts`, `labelled` and `texts` also take `review`, what people said in `make review`.
    `instructions`, `preferences` and `labelled` take `feedback`, what people said about served answers. A list takes both, and a
    file: `[rows.jsonl, review]`. The rows of people stand beside those of the file, or else beside the generated ones.
    With `labelled: feedback` no answers are made of pairs. In training, each of their rows counts `human_weight` times.
    `labelled` has single answers in a format of instructions, with a column `label` that says whether the answer is a good
    one; without it, the answers of pairs are good if they are chosen and bad if they are rejected.
    `replay_instructions` is a general dataset of instructions, or `embedded:general`. Its rows are added to the
    instructions, so that the model forgets less: of the embedded ones as many as there are generated questions, but at least 200.
    They are not held out.

    Up to `wordings` other wordings of each question are trained too. Rules write them, for short English questions.

    Data that the data report calls not fit to train on ends the run before training. `train_unfit` trains on it, and the
    model version is marked with `unfit_data`.
    """

    instructions: str | list[str] | None = None
    preferences: str | list[str] | None = None
    test_instructions: str | None = None
    test_preferences: str | None = None
    prompts: str | list[str] | None = None
    test_prompts: str | None = None
    labelled: str | list[str] | None = None
    test_labelled: str | None = None
    texts: Literal["review"] | None = None
    human_weight: int = Field(1, ge=1)
    format: FormatName | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    replay: ReplayConfig | None = None
    replay_instructions: str | None = None
    rules: RulesConfig = RulesConfig()
    near_duplicate_threshold: float = Field(0.8, gt=0, lt=1)
    decontaminate_against: list[str] = Field(default_factory=list)
    decontaminate_ngram: int = Field(13, ge=1)
    strict: bool = False
    wordings: int = Field(0, ge=0)
    train_unfit: bool = False
    split: SplitConfig = SplitConfig()
    hub: HubConfig | None = None

    def made_of(self, kind: str) -> str:
        """The kind of rows that are read or generated for a kind: without a file and feedback, labelled answers are made of pairs."""
        made_of_pairs = kind == "labelled" and self.file(kind) is None and FEEDBACK not in self.people(kind)
        return "preference" if made_of_pairs else kind

    def own(self, kind: str) -> str | None:
        """The user's own dataset that the rows of a kind are made of; None if there is none."""
        return self.file(self.made_of(kind))

    def file(self, kind: str) -> str | None:
        """The file, folder or hub id that the recipe names for the rows of a kind; None if it names none."""
        return file_among(getattr(self, rows_key(kind)))

    def test_file(self, kind: str) -> str | None:
        """The same for the test split of the user's own rows."""
        found: str | None = getattr(self, f"test_{rows_key(kind)}")
        return found

    def people(self, kind: str) -> list[str]:
        """Which of `PEOPLE` the recipe names for the rows of a kind."""
        named = getattr(self, rows_key(kind)) or []
        return [source for source in PEOPLE if source == named or (isinstance(named, list) and source in named)]

    def only_people(self, kind: str) -> bool:
        """Whether people said all rows of a kind: labelled answers of feedback, without a file."""
        return kind == "labelled" and self.made_of(kind) == kind and self.file(kind) is None

    @property
    def checks(self) -> DataConfig:
        """The keys that decide how rows are checked and split, without the keys that say where rows come from."""
        sources = {"texts", *_OWN_ROWS, *(f"test_{key}" for key in _OWN_ROWS)}
        sources |= {"format", "columns", "replay", "replay_instructions", "train_unfit", "hub"}
        return DataConfig.model_validate(self.model_dump(exclude=sources))

    @model_validator(mode="after")
    def _own_test_split(self) -> Self:
        for key in _OWN_ROWS:
            if getattr(self, f"test_{key}") is not None and file_among(getattr(self, key)) is None:
                raise ValueError(f"test_{key} is set, but {key} is not: set {key} too, or remove test_{key}")
        return self

    @model_validator(mode="after")
    def _people(self) -> Self:
        for key in _OWN_ROWS:
            named = getattr(self, key)
            if not isinstance(named, list):
                continue
            files = [source for source in named if source not in PEOPLE]
            if not named or len(set(named)) < len(named) or len(files) > 1:
                raise ValueError(
                    f"{key} is {named}: a list names at most one file, and {' and '.join(PEOPLE)} once each, e.g. "
                    f"[rows.jsonl, {FEEDBACK if key == 'labelled' else REVIEW}]"
                )
        if FEEDBACK in self.people("prompt"):
            raise ValueError(
                f"prompts: {FEEDBACK} has no meaning, because people judge answers, and a prompt has none: name {FEEDBACK} for "
                f"instructions, preferences or labelled"
            )
        return self


class KnowledgeConfig(Block):
    """How much training on the documents may read.

    `tokens` is the most tokens of the documents, their rewritings and the questions, in all stages on texts and on
    instructions together: rows times epochs, without the rows of `data.replay` and `data.replay_instructions`. Rewritings are
    added until it is reached. If the documents and the questions alone have more, all of them are trained on, and the run
    says so.
    """

    tokens: int = Field(ge=1)


class FormattingConfig(Block):
    """How rows become token ids.

    `chat_template` is null for the model's own template, a name (`alpaca`, `chatml`, `human_assistant`, `llama3`), or the
    path of a Jinja file. `template_date` is the date that the template writes where it asks for today's (`strftime_now`); null
    is 26 July 2024, the date of Llama 3.2's template. A row of more than `max_length` tokens is dropped, cut (`truncate`: its end of turn is then not
    trained), shortened (`drop_oldest_turns`: without the oldest user turns and their answers, until it fits), or an error
    (`raise`). With `train_on_prompt` every token of a row is trained; the held-out loss is still
    that of the answers.
    """

    max_length: int = Field(512, ge=8)
    over_long: Literal["drop", "truncate", "drop_oldest_turns", "raise"] = "drop"
    chat_template: str | None = None
    template_date: date | None = None
    train_on_prompt: bool = False
