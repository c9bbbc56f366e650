"""The base class of all blocks of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """A part of the recipe. Frozen, so that a step cannot change what a later step sees."""

    # YAML has infinities and NaN, no number of a recipe may be one: NaN passes every comparison check.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
