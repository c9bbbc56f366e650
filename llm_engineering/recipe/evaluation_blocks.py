"""The blocks of the recipe that say what is measured of a model, and what it must reach to be promoted."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.generation_blocks import ClientConfig


class Measure(NamedTuple):
    """What a measure is called, in which unit, and which way is better; None where neither is."""

    title: str
    unit: str
    better: Literal["lower", "higher"] | None


# What the evaluation report measures, in its order.
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
# Of a task of lm-eval; its direction stands in the report.
TASK_MEASURE = "lm_eval_"
# Measures over pairs, which a run that ends with SFT has none of.
PAIR_MEASURES = ("preference_accuracy", "preference_margin")


class JudgeConfig(ClientConfig):
    """The model that judges pairs of answers, reached as `generation` reaches its writer; always at temperature 0."""

    max_new_tokens: int = Field(64, ge=16)

    @model_validator(mode="before")
    @classmethod
    def _greedy(cls, keys: Any) -> Any:
        # First, or the client's own check would say that another client takes a temperature.
        if isinstance(keys, dict) and keys.get("temperature") is not None:
            raise ValueError("temperature has no effect: a judge answers at temperature 0. Remove it")
        return keys


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
    them are shown. `checks` is a JSONL file of prompts with what their answers must be like. `repetition_penalty`
    (Keskar et al. 2019, arXiv:1909.05858, section 4.1; 1 is none) holds for these answers, base model's included, and
    is handed over with the merged model, so that what is served answers as what was measured.
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


Bounds = dict[str, Annotated[float, Field(ge=0)] | None]


class Comparisons(Block):
    """Bounds by the model compared with, then by measure: `{base: {heldout_loss: 0.1}}`.

    `incumbent` is the model in production. A bound of null takes an inherited rule away.
    """

    base: Bounds = Field(default_factory=dict)
    sft: Bounds = Field(default_factory=dict)
    incumbent: Bounds = Field(default_factory=dict)


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
            if measure in MEASURES and MEASURES[measure].better is None:
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
