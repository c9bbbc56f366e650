"""The gate: decides by the evaluation report whether a model is promoted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llm_engineering.recipe.evaluation_blocks import HUMAN_MEASURE, Comparisons, PromotionConfig
from llm_engineering.recipe.stages import STAGES

Sense = Literal["better", "not_worse"]

# The confidence of the intervals in reports that do not state it.
CONFIDENCE = 0.95


class Rule(BaseModel):
    """One rule of the gate, with its numbers and its verdict.

    Attributes:
        name: the rule in words.
        value: how much better the candidate is than the model `than`, in the measure's unit. A positive value means
            that the candidate is better, even for a measure where lower is better. None if the report has no such
            comparison.
        low, high: the ends of the interval of `value`. The verdict depends on `low`.
        bound: `low` must be above this number (`better`), or must not be below it (`not_worse`).
        reason: why the rule was skipped, or could not be judged.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    measure: str
    sense: Sense
    than: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float
    verdict: Literal["passed", "failed", "skipped"]
    reason: str = ""


class PromotionDecision(BaseModel):
    """The decision of the gate.

    Attributes:
        candidate: the model that was judged: the name of its stage.
        incumbent: the version in production when the run began; None if there was none.
        passed: whether no rule failed.
        outcome: `stale` if no rule failed, but production has changed since the run began.
        stage: the stage that the model is promoted to; None if it is not promoted.
        reason: the outcome in a sentence.
    """

    model_config = ConfigDict(frozen=True)

    candidate: str
    incumbent: int | None
    confidence: float
    rules: list[Rule]
    passed: bool
    outcome: Literal["passed", "failed", "stale"]
    stage: Literal["staging", "production"] | None
    reason: str


def decide(
    report: Mapping[str, Any], config: PromotionConfig, incumbent: int | None, version: int | None = None
) -> PromotionDecision:
    """Judge the newest model of an evaluation report by the rules for a run that ends with its stage.

    Each rule is judged by the lower end of the interval of the paired gain, so a gain that could be chance does not
    pass a `better_than` rule. A model equal to the other one has a gain of zero: it fails every `better_than` rule and
    passes every `not_worse_than` rule.

    Args:
        report: `report.json` of the evaluation.
        incumbent: the version that was in production when the run began. If there was none, rules about it are
            skipped; if the report does not measure it, they fail.
        version: the model's version, which the remedy names if people must compare it first; None without versions.
    """
    candidate = str(report["newest"])
    gate = config.rules(candidate)
    # A recipe without rules for a stage of its chain is refused when it is read.
    assert gate is not None
    comparisons: dict[Sense, Comparisons] = {"better": gate.better_than, "not_worse": gate.not_worse_than}
    rules = [
        _judge(report, candidate, sense, than, measure, amount, incumbent, version)
        for sense, compared in comparisons.items()
        for than in ("base", *STAGES, "incumbent")
        for measure, amount in compared.bounds(than).items()
        if amount is not None
    ]
    confidence = float(report.get("confidence", CONFIDENCE))
    failed = [rule for rule in rules if rule.verdict == "failed"]
    stage: Literal["staging", "production"] | None = "production" if config.auto else "staging"
    if not STAGES[candidate].policy:
        stage = None
    return PromotionDecision(
        candidate=candidate,
        incumbent=incumbent,
        confidence=confidence,
        rules=rules,
        passed=not failed,
        outcome="failed" if failed else "passed",
        stage=None if failed else stage,
        reason=_reason(failed, confidence, stage, incumbent),
    )


def _judge(
    report: Mapping[str, Any],
    candidate: str,
    sense: Sense,
    than: str,
    measure: str,
    amount: float,
    incumbent: int | None,
    version: int | None,
) -> Rule:
    words = f"better than {than} by more than" if sense == "better" else f"not worse than {than} by more than"
    # 0.0 - x instead of -x: a bound of 0 must not become -0.
    bound = amount if sense == "better" else 0.0 - amount
    rule = Rule(
        name=f"{measure} {words} {amount:g}", measure=measure, sense=sense, than=than, bound=bound, verdict="failed"
    )
    if than == "incumbent" and incumbent is None:
        return rule.model_copy(update={"verdict": "skipped", "reason": "nothing is in production"})
    measured = report["measures"].get(measure, {})
    difference = measured.get("differences", {}).get(f"{candidate}-{than}")
    if difference is None:
        other = f"version {incumbent}, which is in production" if than == "incumbent" else than
        if measure == HUMAN_MEASURE:
            missing = "nobody has compared them on questions that it was not trained on"
            named = f"version {incumbent}" if than == "incumbent" else than
            remedy = f"compare version {version} with {named} by `make review`, then run the same command again"
            return rule.model_copy(update={"reason": f"{missing}: {remedy}"})
        return rule.model_copy(update={"reason": f"the report does not compare {candidate} with {other}"})
    if measured["better"] is None:
        return rule.model_copy(update={"reason": f"neither a higher nor a lower {measure} is better"})
    ends = [float("nan") if difference[key] is None else float(difference[key]) for key in ("value", "low", "high")]
    if not all(map(math.isfinite, ends)):
        return rule.model_copy(
            update={
                "reason": "the difference has no interval: too few rows or documents, or values that are not finite"
            }
        )
    value, low, high = ends
    if measured["better"] == "lower":
        value, low, high = 0.0 - value, 0.0 - high, 0.0 - low
    passed = low > bound if sense == "better" else low >= bound
    verdict = "passed" if passed else "failed"
    return rule.model_copy(update={"value": value, "low": low, "high": high, "verdict": verdict})


def _reason(failed: list[Rule], confidence: float, stage: str | None, incumbent: int | None) -> str:
    if not failed and stage is None:
        return "Every rule passed. A reward model answers nothing, so it is not promoted: name it by its version."
    if not failed:
        return f"Every rule passed, so the model is promoted to {stage}."
    results = [
        f"{rule.name}: {rule.reason}"
        if rule.value is None
        else f"{rule.name}: {rule.value:.4f}, {confidence:.0%} interval {rule.low:.4f} to {rule.high:.4f}"
        for rule in failed
    ]
    stays = f"version {incumbent} stays in production" if incumbent is not None else "production stays empty"
    return f"Not promoted, {stays}. Failed: {'; '.join(results)}."
