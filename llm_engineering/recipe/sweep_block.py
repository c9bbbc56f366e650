"""The recipe's block `sweep`: the values to try, and how many trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.stage_blocks import ReferenceConfig
from llm_engineering.recipe.stages import STAGES
from llm_engineering.recipe.training_blocks import TrainConfig

Number = StrictInt | StrictFloat
Value = StrictBool | StrictInt | StrictFloat | StrictStr | None

# Blocks and keys that do not change the trained model, or are not values of one experiment.
_FIXED = ("name", "seed", "chain", "compute", "evaluation", "exam", "promotion", "tracking", "hub", "sweep")
# Keys of a stage that change what its loss measures.
_LOSS = (
    "beta",
    "center_rewards_coefficient",
    "desirable_weight",
    "discopop_tau",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_type",
    "router_aux_loss_coef",
    "sft_weight",
    "simpo_gamma",
    "undesirable_weight",
    "use_weighting",
)


class Range(Block):
    """The values of one key: from `low` to `high`, or `choices`.

    `log: true` draws evenly over orders of magnitude, as learning rates need it. `step` is the distance of two values. The
    values are whole numbers if `low`, `high` and `step` are.
    """

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: Number | None = Field(None, gt=0)
    choices: list[Value] | None = Field(None, min_length=2)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices stand alone: remove low, high, log and step, or choices")
            return self
        if self.low is None or self.high is None:
            raise ValueError("name low and high, e.g. {low: 1e-5, high: 1e-3, log: true}, or choices, e.g. [8, 16, 64]")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, and low is {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step cannot both be set: remove one of them")
        return self

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step) if value is not None)

    @property
    def ends(self) -> list[Value]:
        """The lowest and the highest value, or all choices."""
        return self.choices if self.choices is not None else [self.low, self.high]

    def holds(self, value: object) -> bool:
        """Whether a value lies in the range."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.step is None or abs(remainder_of(value - self.low, self.step)) < 1e-9


def remainder_of(distance: float, step: float) -> float:
    """How far a distance is from the nearest multiple of a step, as a share of the step."""
    return distance / step - round(distance / step)


class SweepConfig(Block):
    """Trials of a stage with values from `ranges`, by the full path of a key, e.g. `sft.learning_rate`.

    The trial with the lowest validation loss of `stage` wins; the default is the last stage of the chain with a range, else
    the first. `trials` counts the first trial too, which has the recipe's own values, if they lie in the ranges. Values are
    drawn by TPE (Bergstra et al. 2011) with `seed`. After `prune_after` trials, a trial is stopped if its validation loss is
    above the median of earlier trials at the same share of training; null stops none. The winner is trained `repeats` times
    more with other seeds, to show how much of its lead is chance.
    """

    ranges: dict[str, Range] = Field(min_length=1)
    stage: str | None = None
    trials: int = Field(20, ge=2)
    repeats: int = Field(3, ge=2)
    seed: int = Field(42, ge=0)
    prune_after: int | None = Field(5, ge=1)

    def stage_of(self, chain: list[str]) -> str:
        """The stage whose validation loss decides."""
        named = [stage for stage in chain if any(key.startswith(f"{stage}.") for key in self.ranges)]
        return self.stage or (named[-1] if named else chain[0])

    def problem(self, chain: list[str], blocks: Mapping[str, TrainConfig]) -> str:
        """Why the trials could not be compared; empty if they can."""
        stage = self.stage_of(chain)
        if stage not in chain:
            return f"sweep.stage is {stage}, which is not in the chain ({', '.join(chain)}): name one of its stages"
        if STAGES[stage].rows == "prompt":
            return (
                f"sweep.stage {stage} learns from rewards and has no validation loss: name another stage of the chain"
            )
        for key in self.ranges:
            block, _, name = key.partition(".")
            if block in _FIXED:
                return f"sweep.ranges.{key} does not change the trained model, or changes what it is compared with: remove it"
            if block == stage and name in _LOSS:
                return f"sweep.ranges.{key} changes what the validation loss of {stage} measures: remove it"
            if block in chain and chain.index(block) > chain.index(stage):
                return f"sweep.ranges.{key} has no effect on {stage}, which is trained before {block}: remove it"
            if block in chain and block != stage and isinstance(blocks[stage], ReferenceConfig):
                return (
                    f"sweep.ranges.{key} changes the model that the loss of {stage} is measured against: sweep {block} alone, "
                    "and then " + stage
                )
        return ""
