"""The base class of all blocks of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """A block of the recipe. It is frozen, so that no step can change what a later step reads."""

    # YAML can write infinity and NaN, but NaN is neither above nor below a bound and would pass the checks.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
