"""Each stage has the losses of a plain TRL script on the same rows, from the same start, step by step.

The two sides share the model, the rows as text, the seed and the hyperparameters. Each side renders and labels the rows,
draws their order and the first weights of the adapter, and computes batches, losses, gradients and updates. Equal seeds
make order and first weights equal: `transformers.set_seed` before the model is loaded, and the trainer's `seed`.

The losses are not equal to the last bit. TRL pads the rows of a batch, and the project concatenates them and sums
losses and gradients over chunks of tokens. So float32 sums have another order.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llm_engineering.models.chat_template import template_text
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.stage_blocks import CPTConfig, DPOConfig, KTOConfig, RewardConfig, SFTConfig
from llm_engineering.recipe.stages import STAGES as TABLE
from tests.tiny_models import formatted, instruction, labelled, logged, pair, text, train, training_setup

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 20
# Every row is shorter, and a packed row of this length holds two rows. So each case has ten steps of two rows.
MAX_LENGTH = 320
STEPS = 10
# The learning rate rises in the first step and then falls.
SCHEDULE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
}
ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
# For each value of each step. Losses, gradient norms and log-probabilities differ by 4e-7 at most, which is three last bits
# of float32. Rewards are small differences of log-probabilities, so their absolute difference counts: 1e-7 at most.
RELATIVE, ABSOLUTE = 1e-5, 1e-6


class Case(NamedTuple):
    """What both sides train.

    Attributes:
        stage: a key of `STAGES`.
        method: `lora` or `full`.
        options: hyperparameters that differ from `SCHEDULE`. TRL and the recipe name them alike.
    """

    stage: str
    method: str
    options: dict[str, Any]


class Side(NamedTuple):
    """One side of a case: the model's folder, a folder to write to, and the trained weights that the stage starts from."""

    case: Case
    model: Path
    output: Path
    start: Path | None = None


class Stage(NamedTuple):
    """A stage on both sides.

    Attributes:
        trainer, arguments: TRL's classes.
        block: the project's class of the configuration.
        row: makes a row from its number.
        columns: TRL's columns of the rows; each is a list of messages, a text or a label.
        options: hyperparameters of this stage, with TRL's names.
        start: the stage whose weights this one trains further; None for the base model.
        values: names in the history that are compared beside loss, gradient norm and learning rate.
    """

    trainer: Any
    arguments: Any
    block: Any
    row: Any
    columns: tuple[str, ...]
    options: dict[str, Any]
    start: str | None = None
    values: tuple[str, ...] = ()


REWARDS = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
PAIRS = ("prompt", "chosen", "rejected")
ANSWERS = ("prompt", "completion")
STAGES = {
    # The default of the project is packing, which is off in TRL.
    "cpt": Stage(trl.SFTTrainer, trl.SFTConfig, CPTConfig, text, ("text",), {"packing": False}),
    "sft": Stage(trl.SFTTrainer, trl.SFTConfig, SFTConfig, instruction, ANSWERS, {"packing": False}),
    "dpo": Stage(
        trl.DPOTrainer, trl.DPOConfig, DPOConfig, pair, PAIRS, {"beta": 0.1}, "sft", (*REWARDS, "rewards/margins")
    ),
    "kto": Stage(
        trl.KTOTrainer, trl.KTOConfig, KTOConfig, labelled, (*ANSWERS, "label"), {"beta": 0.1}, "sft", ("kl", *REWARDS)
    ),
    "reward": Stage(
        trl.RewardTrainer, trl.RewardConfig, RewardConfig, pair, PAIRS, {"center_rewards_coefficient": 0.01}, "sft",
        ("accuracy", "margin", "min_reward", "max_reward"),
    ),
}  # fmt: skip


def plain(side, seed):
    """A trainer of TRL, as a user of TRL writes it."""
    stage = STAGES[side.case.stage]
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(side.model)
    tokenizer.chat_template = template_text("alpaca")
    rows = Dataset.from_list([stage.row(n).model_dump(include=set(stage.columns)) for n in range(ROWS)])
    if side.case.stage == "kto":
        # TRL takes the rows in their order.
        rows = rows.shuffle(seed=seed)
    if side.case.stage == "reward":
        # The tiny tokenizer's only special token ends answers. As the pad token, it would hide the ends.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    fresh = side.case.method == "lora" and stage.start is None
    return stage.trainer(
        model=scoring_model(side) if side.case.stage == "reward" else writing_model(side),
        args=stage.arguments(
            **(SCHEDULE | stage.options | side.case.options), output_dir=str(side.output), max_length=MAX_LENGTH,
            warmup_steps=0.1, seed=seed, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(**ADAPTER, task_type="CAUSAL_LM") if fresh else None,
    )  # fmt: skip


def writing_model(side):
    """The model that the stage starts from. A fresh adapter is TRL's to make."""
    if side.case.method == "full":
        return AutoModelForCausalLM.from_pretrained(side.start or side.model, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(side.model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, side.start, is_trainable=True) if side.start else base


def scoring_model(side):
    """The model that the stage starts from, with a head that scores."""
    folder = side.model if side.case.method == "lora" else side.start
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    if side.case.method == "lora":
        # The class of the saved adapter would drop the head, so the adapter is loaded into one that trains it.
        model = get_peft_model(model, LoraConfig(**ADAPTER, task_type="SEQ_CLS", modules_to_save=["score"]))
        weights = get_peft_model_state_dict(model) | load_peft_weights(str(side.start), device="cpu")
        set_peft_model_state_dict(model, weights)
    return model


def ours(side, setup, settings):
    """The result of the project's training."""
    stage = STAGES[side.case.stage]
    side.output.mkdir()
    rows = formatted(TABLE[side.case.stage].rows, ROWS, load_tokenizer(setup.model, settings, "alpaca"), side.output)
    # Evaluated and saved once, after the last step.
    schedule = {"warmup_ratio": 0.1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    adapter = {"lora": ADAPTER} if side.case.method == "lora" and stage.start is None else {}
    config = stage.block(**SCHEDULE | stage.options | side.case.options | schedule | adapter)
    return train(rows, config, setup, settings, start=side.start)


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
PACKED = {"packing": True, "per_device_train_batch_size": 1}
CASES = {
    "cpt": Case("cpt", "lora", {}),
    "cpt-full": Case("cpt", "full", {}),
    "cpt-packed": Case("cpt", "lora", PACKED),
    "sft": Case("sft", "lora", {}),
    "sft-full": Case("sft", "full", {}),
    "sft-accumulated": Case("sft", "lora", ACCUMULATED),
    "sft-packed": Case("sft", "lora", PACKED),
    "dpo": Case("dpo", "lora", {}),
    "dpo-full": Case("dpo", "full", {}),
    "dpo-accumulated": Case("dpo", "lora", ACCUMULATED),
    "dpo-precomputed": Case("dpo", "lora", {"precompute_ref_log_probs": True}),
    "kto": Case("kto", "lora", {}),
    "kto-full": Case("kto", "full", {}),
    "kto-precomputed": Case("kto", "lora", {"precompute_ref_log_probs": True}),
    "kto-unpaired": Case("kto", "lora", {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.2}),
    "reward": Case("reward", "lora", {}),
    "reward-full": Case("reward", "full", {}),
    "reward-accumulated": Case("reward", "lora", ACCUMULATED),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_are_those_of_plain_trl(case, small_llama, settings, tmp_path):
    stage = STAGES[case.stage]
    setup = training_setup(small_llama, max_length=MAX_LENGTH).model_copy(update={"method": case.method})
    start = None
    if stage.start is not None:
        first = Side(Case(stage.start, case.method, {}), small_llama, tmp_path / "first")
        start = ours(first, setup, settings).adapter

    trainer = plain(Side(case, small_llama, tmp_path / "plain", start), setup.seed)
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = ours(Side(case, small_llama, tmp_path / "ours", start), setup, settings)

    assert len(expected) == STEPS
    for name in ("loss", "grad_norm", "learning_rate", *stage.values):
        # A batch of KTO may have only good or only bad answers.
        values = [entry[name] for entry in expected if name in entry]
        assert len(values) > STEPS // 2
        assert logged(result, name) == pytest.approx(values, rel=RELATIVE, abs=ABSOLUTE), name
    # Training has changed the losses by far more than the tolerances.
    assert abs(expected[-1]["loss"] / expected[0]["loss"] - 1) > 1e-2
