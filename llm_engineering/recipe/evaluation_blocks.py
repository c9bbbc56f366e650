"""The recipe's blocks about evaluation: what is measured, and what a model must reach to be promoted."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.generation_blocks import ClientConfig


class Measure(NamedTuple):
    """The title and the unit of a measure, and which direction is better; None if neither is."""

    title: str
    unit: str
    better: Literal["lower", "higher"] | None


# The measures of the evaluation report, in its order.
MEASURES = {
    "heldout_loss": Measure("Held-out loss", "nats a token", "lower"),
    "perplexity": Measure("Perplexity", "per token", "lower"),
    "question_gain": Measure("Gain from the question", "nats a token", "higher"),
    "preference_accuracy": Measure("Preference accuracy", "share of pairs", "higher"),
    "preference_margin": Measure("Preference margin", "nats a token", "higher"),
    "rouge_l": Measure("ROUGE-L against the reference", "F1", "higher"),
    "stopped": Measure("Answers that end by themselves", "share of answers", "higher"),
    "repetition": Measure("Repeated 4-grams", "share of an answer", "lower"),
    "length_ratio": Measure("Length against the reference", "ratio of tokens", None),
    "empty": Measure("Empty answers", "share of answers", "lower"),
    "checks": Measure("Own check", "share passed", "higher"),
    "judge_win_rate": Measure("Judge", "share won", "higher"),
}
# The prefix of the measures of lm-eval's tasks. For each of these measures, the evaluation report states whether higher
# or lower is better.
TASK_MEASURE = "lm_eval_"
# Measures over preference pairs. A run that ends with SFT has no pairs.
PAIR_MEASURES = ("preference_accuracy", "preference_margin")


class JudgeConfig(ClientConfig):
    """The model that judges pairs of answers, always at temperature 0. The keys are those of `generation`."""

    max_new_tokens: int = Field(64, ge=16)

    @model_validator(mode="before")
    @classmethod
    def _greedy(cls, keys: Any) -> Any:
        # This runs first. Otherwise ClientConfig's own validator would report `temperature` first, and advise the user
        # to choose another client.
        if isinstance(keys, dict) and keys.get("temperature") is not None:
            raise ValueError("temperature has no effect: a judge answers at temperature 0. Remove it")
        return keys


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
    """Held-out measures, each with a bootstrap interval over rows.

    Every model answers `generated_rows` held-out rows, which are drawn with the seed; the first `sample_answers` of the
    answers are shown. `checks` is a JSONL file of prompts with conditions for their answers. `repetition_penalty`
    (Keskar et al. 2019, arXiv:1909.05858, section 4.1; 1 is none) applies to the answers of all models, also of the base
    model. The merged model gets it too, so that it is served as it was measured.
    """

    batch_size: int = Field(8, ge=1)
    sample_answers: int = Field(20, ge=1)
    generated_rows: int = Field(20, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    repetition_penalty: float = Field(1.0, ge=1.0)
    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, ge=0.5, lt=1)
    judge: JudgeConfig | None = None
    lm_eval: LmEvalConfig | None = None
    checks: str | None = None

    @model_validator(mode="after")
    def _shown(self) -> Self:
        if self.sample_answers > self.generated_rows:
            raise ValueError(
                f"sample_answers ({self.sample_answers}) is larger than generated_rows ({self.generated_rows}): lower it, "
                "because only generated answers can be shown"
            )
        return self

    def computes(self, measure: str) -> bool:
        """Whether this evaluation computes a measure."""
        if measure.startswith(TASK_MEASURE):
            return self.lm_eval is not None and measure.removeprefix(TASK_MEASURE) in self.lm_eval.tasks
        optional = {"checks": self.checks, "judge_win_rate": self.judge}
        return optional[measure] is not None if measure in optional else measure in MEASURES


Bounds = dict[str, Annotated[float, Field(ge=0)] | None]


class Comparisons(Block):
    """Bounds by the other model of the comparison, then by measure: `{base: {heldout_loss: 0.1}}`.

    `incumbent` is the model in production. A bound of null removes an inherited rule.
    """

    base: Bounds = Field(default_factory=dict)
    sft: Bounds = Field(default_factory=dict)
    incumbent: Bounds = Field(default_factory=dict)


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


class PromotionConfig(Block):
    """The gate's rules for a run that ends with SFT and for a run that ends with DPO.

    With `auto` a model that passes is promoted to production at once.
    """

    sft: GateRules
    dpo: GateRules
    auto: bool = False

    @model_validator(mode="after")
    def _known_measures(self) -> Self:
        for path, measure in self.measures():
            if measure in MEASURES and MEASURES[measure].better is None:
                raise ValueError(f"{path}: neither a higher nor a lower {measure} is better: remove the rule")
            if measure not in MEASURES and not measure.startswith(TASK_MEASURE):
                near = get_close_matches(measure, MEASURES, n=1, cutoff=0.5)
                known = (
                    f"did you mean {near[0]}?" if near else f"the measures are {', '.join(MEASURES)} and lm_eval_<task>"
                )
                raise ValueError(f"{path}: there is no measure {measure}; {known}")
            if path.startswith("sft.") and measure in PAIR_MEASURES:
                raise ValueError(
                    f"{path}: a run that ends with SFT has no held-out pairs to measure {measure} on: "
                    "move the rule to promotion.dpo"
                )
        if self.sft.better_than.sft or self.sft.not_worse_than.sft:
            raise ValueError(
                "sft: a run that ends with SFT has no second SFT model to compare with: remove the key sft"
            )
        return self

    def measures(self) -> Iterator[tuple[str, str]]:
        """The path of every rule, and the measure that it names."""
        for run in ("sft", "dpo"):
            for sense in ("better_than", "not_worse_than"):
                comparisons: Comparisons = getattr(getattr(self, run), sense)
                for model in Comparisons.model_fields:
                    for measure, bound in getattr(comparisons, model).items():
                        if bound is not None:
                            yield f"{run}.{sense}.{model}", measure
