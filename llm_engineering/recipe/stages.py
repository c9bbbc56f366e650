"""The table of training stages.

A stage is a kind of rows, a block of the recipe, and a function that trains. To add a stage, write its block in
`stage_blocks.py` and its function in a file of `training/`, and add a row to `STAGES`. The recipe, the pipelines, the
command line, dispatch and evaluation read the table. It is in this package, the lowest one, because the recipe gets a
block for each stage.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import create_model

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.online_blocks import GRPOConfig, RLOOConfig
from llm_engineering.recipe.stage_blocks import CPTConfig, DPOConfig, KTOConfig, RewardConfig, SFTConfig
from llm_engineering.recipe.training_blocks import TrainConfig

Kind = Literal["text", "instruction", "preference", "labelled", "prompt"]


class Stage(NamedTuple):
    """A training stage. It starts from the last model before it in the recipe's `chain` that writes, or from the base model.

    Attributes:
        rows: the kind of its training rows, see `llm_engineering.data.rows`.
        block: the class of its block in the recipe.
        train: module and name of its function, which takes a `Job`, the formatted rows and the settings, and returns a
            `TrainingResult`. It is imported only when the stage trains, because unsloth must be imported before torch.
        title: what the stage does, in a few words.
        policy: whether its model writes answers. A reward model scores them: it is no start for other stages, is not
            promoted, and has measures of its own.
    """

    name: str
    rows: Kind
    block: type[TrainConfig]
    train: tuple[str, str]
    title: str
    policy: bool = True

    def train_function(self) -> Callable[..., Any]:
        """Import the function that trains the stage."""
        module, name = self.train
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


_TRAINING = "llm_engineering.training"
_ROWS = (
    Stage("cpt", "text", CPTConfig, (f"{_TRAINING}.cpt", "train_cpt"), "continued pre-training"),
    Stage("sft", "instruction", SFTConfig, (f"{_TRAINING}.sft", "train_sft"), "supervised fine-tuning"),
    # The reference of a preference stage is the model that it starts from.
    Stage("dpo", "preference", DPOConfig, (f"{_TRAINING}.dpo", "train_dpo"), "direct preference optimisation"),
    Stage("kto", "labelled", KTOConfig, (f"{_TRAINING}.kto", "train_kto"), "Kahneman-Tversky optimisation"),
    Stage("reward", "preference", RewardConfig, (f"{_TRAINING}.reward", "train_reward"), "reward model", policy=False),
    Stage("rloo", "prompt", RLOOConfig, (f"{_TRAINING}.rloo", "train_rloo"), "REINFORCE leave-one-out on rewards"),
    Stage("grpo", "prompt", GRPOConfig, (f"{_TRAINING}.grpo", "train_grpo"), "group relative policy optimisation"),
)
STAGES = {stage.name: stage for stage in _ROWS}
# The stage whose formatted rows the evaluation reads, if no stage of the chain has rows of this kind.
FIRST_OF_KIND: dict[str, str] = {stage.rows: stage.name for stage in reversed(_ROWS)}


def with_stages(name: str, field: Callable[[Stage], tuple[Any, Any]], base: type[Block] = Block) -> Any:
    """A block with the keys of `base` and a key for each stage; `field` returns the type and the default of the key."""
    fields: dict[str, Any] = {stage.name: field(stage) for stage in STAGES.values()}
    return create_model(name, __base__=base, __module__=__name__, **fields)
