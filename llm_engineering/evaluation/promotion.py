"""The gate: whether a model's measures are good enough for a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llm_engineering.config import PromotionConfig


class Rule(BaseModel):
    """One rule of the gate, with its number and its verdict."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: float
    bound: float
    passed: bool


class PromotionDecision(BaseModel):
    """What the gate decided: `stage` is None where a rule failed, and the incumbent stays."""

    model_config = ConfigDict(frozen=True)

    rules: list[Rule]
    passed: bool
    stage: Literal["staging", "production"] | None


def decide(metrics: Mapping[str, float], config: PromotionConfig) -> PromotionDecision:
    """Judge the newest model in `metrics`: `dpo` where there is one, else `sft`.

    The held-out loss must be below the base model's by more than `min_loss_gain`. After DPO, the preference accuracy
    must also be above the SFT model's by more than `min_preference_accuracy_gain`, and the held-out loss at most
    `max_loss_rise_after_dpo` above it.
    """
    model = "dpo" if "heldout_loss_dpo" in metrics else "sft"
    gain = metrics["heldout_loss_base"] - metrics[f"heldout_loss_{model}"]
    rules = [_above("held-out loss below base by more than", gain, config.min_loss_gain)]
    if model == "dpo":
        accuracy = metrics["preference_accuracy_dpo"] - metrics["preference_accuracy_sft"]
        rise = metrics["heldout_loss_dpo"] - metrics["heldout_loss_sft"]
        bound = config.max_loss_rise_after_dpo
        rules.append(
            _above("preference accuracy above SFT by more than", accuracy, config.min_preference_accuracy_gain)
        )
        rules.append(Rule(name="held-out loss above SFT by at most", value=rise, bound=bound, passed=rise <= bound))
    passed = all(rule.passed for rule in rules)
    stage: Literal["staging", "production"] = "production" if config.auto else "staging"
    return PromotionDecision(rules=rules, passed=passed, stage=stage if passed else None)


def _above(name: str, value: float, bound: float) -> Rule:
    return Rule(name=name, value=value, bound=bound, passed=value > bound)
