"""The recipe's blocks about evaluation: what is measured, and what a model must reach to be promoted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK
from llm_engineering.recipe.generation_blocks import JudgeConfig
from llm_engineering.recipe.reward_blocks import VersionName
from llm_engineering.recipe.stages import STAGES, with_stages


class Measure(NamedTuple):
    """The title and the unit of a measure, and which direction is better; None if neither is.

    `least` and `most` are its smallest and largest possible value. A share of rows needs none: its interval is Wilson's.
    """

    title: str
    unit: str
    better: Literal["lower", "higher"] | None
    least: float = -math.inf
    most: float = math.inf

    @property
    def span(self) -> float:
        """The largest possible difference of two values."""
        return self.most - self.least


# The name of the model in production among the models that are compared.
INCUMBENT = "incumbent"
# The measures of the evaluation report, in its order.
MEASURES = {
    "exam_accuracy": Measure("Exam: right answers", "share of questions", "higher"),
    "exam_multi_hop": Measure("Exam: right answers that need two facts", "share of questions", "higher"),
    "exam_abstention": Measure("Exam: declined, where the documents do not say", "share of questions", "higher"),
    "exam_control": Measure("Exam: general questions", "share of questions", "higher"),
    "heldout_loss": Measure("Held-out loss", "nats a token", "lower", least=0),
    "perplexity": Measure("Perplexity", "per token", "lower", least=1),
    "question_gain": Measure("Gain from the question", "nats a token", "higher"),
    "document_loss": Measure("Loss on held-out documents", "nats a token", "lower", least=0),
    "preference_accuracy": Measure("Preference accuracy", "share of pairs", "higher"),
    "preference_margin": Measure("Preference margin", "nats a token", "higher"),
    "reward_accuracy": Measure("Reward accuracy", "share of pairs", "higher"),
    "rouge_l": Measure("ROUGE-L against the reference", "F1", "higher", least=0, most=1),
    "stopped": Measure("Answers that end by themselves", "share of answers", "higher"),
    "repetition": Measure("Repeated 4-grams", "share of an answer", "lower", least=0, most=1),
    "length_ratio": Measure("Length against the reference", "ratio of tokens", None, least=0),
    "empty": Measure("Empty answers", "share of answers", "lower"),
    "reward": Measure("Reward", "weighted sum", "higher"),
    "checks": Measure("Own check", "share passed", "higher"),
    "canaries": Measure("Canaries that the model gives away", "share of canaries", "lower"),
    "judge_win_rate": Measure("Judge", "share won", "higher", least=0, most=1),
    "human_win_rate": Measure("People, in blind comparisons", "share won", "higher"),
    "reward_model_win_rate": Measure("Reward model", "share won", "higher", least=0, most=1),
}
# The share of blind comparisons that people decided for a model.
HUMAN_MEASURE = "human_win_rate"
# The prefix of the measures of lm-eval's tasks. For each of these measures, the evaluation report states whether higher
# or lower is better.
TASK_MEASURE = "lm_eval_"
# The weighted sum of the rewards of a stage, and the prefix of each single one. A run without such a stage has none.
REWARD = "reward"
REWARD_PREFIX = "reward_"
# Measures over held-out questions, preference pairs, and documents. A run without a stage that trains on them has none.
QUESTION_MEASURES = (
    "heldout_loss", "perplexity", "question_gain", "rouge_l", "stopped", "repetition", "length_ratio", "empty",
)  # fmt: skip
PAIR_MEASURES = ("preference_accuracy", "preference_margin")
DOCUMENT_MEASURES = ("document_loss",)
# The only measure of a run that ends with a reward model: the share of pairs that it orders rightly. Chance is 0.5.
REWARD_MEASURE = "reward_accuracy"
# The kinds of questions of an exam, with the measure of each. A recipe without the block `exam` has none.
EXAM_MEASURES = {
    "single": "exam_accuracy",
    "multi_hop": "exam_multi_hop",
    "unanswerable": "exam_abstention",
    "control": "exam_control",
}
# General questions that come with the project.
EMBEDDED_CONTROL = "embedded:general"
# The `exam.path` of questions that a run writes from the documents.
GENERATED_EXAM = "generated"
# If a model answers 6 of 10 questions right and the base model none, the interval of the difference spans 0.16 to 0.83. Fewer
# questions say nothing.
MIN_QUESTIONS = 10


def is_reward(measure: str) -> bool:
    """Whether a measure is a single reward of a stage, e.g. `reward_stopped`."""
    return measure.startswith(REWARD_PREFIX) and measure not in MEASURES


class LmEvalConfig(Block):
    """Tasks of lm-eval, from the library or from the YAML files in the folder `include_path`.

    Names and meanings are those of lm_eval.simple_evaluate.
    """

    tasks: list[str] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    include_path: str | None = None
    apply_chat_template: bool = True


class EvaluationConfig(Block):
    """Held-out measures, each with an interval over documents.

    Every model answers `generated_rows` held-out rows, which are drawn with the seed; the first `sample_answers` of the
    answers are shown. `checks` is a JSONL file of prompts with conditions for their answers. `canaries` is one of secrets that were
    planted in the data, with the words before them. `repetition_penalty`
    (Keskar et al. 2019, arXiv:1909.05858, section 4.1; 1 is none) applies to the answers of all models, also of the base
    model. The merged model gets it too, so that it is served as it was measured. `reward_model` is the version of a reward model
    that judges the answers, of the recipe's name, e.g. 3, or of another one, e.g. `other-recipe:3`. Intervals of measures that are not shares of
    rows use `bootstrap_samples` resamples.
    """

    batch_size: int = Field(8, ge=1)
    sample_answers: int = Field(20, ge=1)
    generated_rows: int = Field(20, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    repetition_penalty: float = Field(1.0, ge=1.0)
    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, ge=0.5, lt=1)
    judge: JudgeConfig | None = None
    reward_model: VersionName | None = None
    lm_eval: LmEvalConfig | None = None
    checks: str | None = None
    canaries: str | None = None

    @model_validator(mode="after")
    def _shown(self) -> Self:
        if self.sample_answers > self.generated_rows:
            raise ValueError(
                f"sample_answers ({self.sample_answers}) is larger than generated_rows ({self.generated_rows}): lower it, "
                "because only generated answers can be shown"
            )
        return self


class ExamConfig(Block):
    """Questions about the documents, which every model answers without them.

    `path` and `control` are JSONL files of questions with their accepted answers. With `path: generated`, the run writes
    up to `questions` questions about the documents in wordings that are left out of training, and a fifth as many that the
    documents do not answer. `control` has questions that have nothing to do with the documents, to show whether a model
    forgets; null leaves it out. The base model and the newest model also answer with `retrieval_passages` passages of the
    documents before the question, found by BM25; 0 leaves that out.
    """

    path: str
    questions: int = Field(60, ge=MIN_QUESTIONS)
    control: str | None = EMBEDDED_CONTROL
    max_new_tokens: int = Field(24, ge=1)
    retrieval_passages: int = Field(2, ge=0, le=20)

    @model_validator(mode="after")
    def _embedded_names(self) -> Self:
        for key, value, known in (("path", self.path, EMBEDDED_HANDBOOK), ("control", self.control, EMBEDDED_CONTROL)):
            if value is not None and value.startswith("embedded:") and value != known:
                raise ValueError(f"{key} {value} does not exist: name a JSONL file, or {known}")
        # A recipe that extends one with the default keeps it.
        if not self.is_generated and self.questions != ExamConfig.model_fields["questions"].default:
            raise ValueError(
                f"questions has no effect with path {self.path}, whose questions are all asked: remove it, or set path to "
                f"{GENERATED_EXAM}"
            )
        return self

    @property
    def is_generated(self) -> bool:
        """Whether a run writes the questions about the documents."""
        return self.path == GENERATED_EXAM


Bounds = dict[str, Annotated[float, Field(ge=0)] | None]


_StageBounds: Any = with_stages("_StageBounds", lambda _: (Bounds, Field(default_factory=dict)))


class Comparisons(_StageBounds):  # type: ignore[misc]
    """Bounds by the other model of the comparison, then by measure: `{base: {heldout_loss: 0.1}}`.

    The other model is `base`, `incumbent` (the model in production), or the model of an earlier stage. A bound of null
    removes an inherited rule.
    """

    base: Bounds = Field(default_factory=dict)
    incumbent: Bounds = Field(default_factory=dict)

    def bounds(self, than: str) -> Bounds:
        """The bounds of the comparison with a model."""
        found: Bounds = getattr(self, than)
        return found


class GateRules(Block):
    """The bounds that a model must pass to be promoted, in the units of the measures.

    The model must be better by more than each bound of `better_than`, and not worse by more than each bound of
    `not_worse_than`. Both are judged by the unfavourable end of the interval of the paired difference.
    """

    better_than: Comparisons
    not_worse_than: Comparisons = Comparisons()

    @model_validator(mode="after")
    def _base_and_incumbent(self) -> Self:
        # Without such a rule a model that equals the other one would pass.
        for model in ("base", "incumbent"):
            if all(bound is None for bound in getattr(self.better_than, model).values()):
                raise ValueError(
                    f"better_than.{model} has no measure: a model must be better than {model} in at least one, so add "
                    f"e.g. {model}: {{heldout_loss: 0.0}}"
                )
        return self


class RewardGateRules(GateRules):
    """The bounds for a reward model, all of `better_than.base` and of `reward_accuracy`. The base model stands for chance, 0.5.

    A reward model that passes is not promoted, because it answers nothing: its users name its version.
    """

    @model_validator(mode="after")
    def _base_and_incumbent(self) -> Self:
        named = [
            (sense, model)
            for sense in ("better_than", "not_worse_than")
            for model in type(self.better_than).model_fields
        ]
        wrong = next(
            (f"{sense}.{model}" for sense, model in named if model != "base" and getattr(self, sense).bounds(model)),
            None,
        )
        if wrong is not None:
            raise ValueError(f"{wrong} has no effect: a reward model is compared with chance, which is base. Remove it")
        if all(bound is None for bound in self.better_than.base.values()):
            raise ValueError(
                f"better_than.base has no measure: a reward model must be better than chance, so add base: {{{REWARD_MEASURE}: "
                "0.0}"
            )
        return self


class RulePath(NamedTuple):
    """A rule of the gate: the stage with which its run ends, the other model, the measure, and the path of its key."""

    run: str
    than: str
    measure: str
    path: str


_StageRules: Any = with_stages(
    "_StageRules", lambda stage: ((GateRules if stage.policy else RewardGateRules) | None, None)
)


class PromotionConfig(_StageRules):  # type: ignore[misc]
    """The gate's rules for a run that ends with a stage, by the name of the stage.

    With `auto` a model that passes is promoted to production at once.
    """

    auto: bool = False

    def rules(self, stage: str) -> GateRules | None:
        """The rules for a run that ends with a stage."""
        found: GateRules | None = getattr(self, stage)
        return found

    @model_validator(mode="after")
    def _known_measures(self) -> Self:
        for rule in self.all_rules():
            path, measure = rule.path, rule.measure
            if measure in MEASURES and MEASURES[measure].better is None:
                raise ValueError(f"{path}: neither a higher nor a lower {measure} is better: remove the rule")
            if measure not in MEASURES and not measure.startswith(TASK_MEASURE) and not is_reward(measure):
                near = get_close_matches(measure, MEASURES, n=1, cutoff=0.5)
                known = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"the measures are {', '.join(MEASURES)}, reward_<name> and lm_eval_<task>"
                )
                raise ValueError(f"{path}: there is no measure {measure}; {known}")
        return self

    def all_rules(self) -> Iterator[RulePath]:
        """Every rule that is not removed."""
        for run in STAGES:
            gate = self.rules(run)
            if gate is None:
                continue
            for sense in ("better_than", "not_worse_than"):
                comparisons: Comparisons = getattr(gate, sense)
                for model in type(comparisons).model_fields:
                    for measure, bound in comparisons.bounds(model).items():
                        if bound is not None:
                            yield RulePath(run, model, measure, f"{run}.{sense}.{model}")
