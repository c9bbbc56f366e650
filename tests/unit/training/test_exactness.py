"""Batch sizes and packing do not change what training computes, and the reference runs keep their losses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llm_engineering.models.base_model import load_model
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.sft import sft_trainer
from tests.renew_references import FOLDER, STEPS, losses
from tests.tiny_models import CPU, formatted, logged, prepared, train, training_setup


@pytest.fixture
def rows(alpaca_tokenizer, tmp_path):
    return formatted("instruction", 16, alpaca_tokenizer, tmp_path)


def test_accumulated_batches_train_like_one(rows, setup, settings):
    """The rows differ in length, so the mean of the small batches' mean losses would weight their tokens differently."""
    histories = []
    for batch, accumulated in ((1, 8), (8, 1)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        config = SFTConfig(**STEPS | sizes | {"num_train_epochs": 2}, packing=False)
        result = train(rows, config, setup, settings)
        histories.append(logged(result))
    assert len(histories[0]) == 4
    assert histories[0] == pytest.approx(histories[1], abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_gradient_checkpointing_changes_neither_losses_nor_adapters(stage, rows, pairs, setup, settings):
    """The dropout of the adapter has to be the same when a layer is computed again."""
    results = []
    for checkpointing in (False, True):
        steps = STEPS | {"gradient_checkpointing": checkpointing}
        if stage == "sft":
            config = SFTConfig(**steps, packing=False, lora=LoraConfig(r=4, lora_dropout=0.2))
            result = train(rows, config, setup, settings)
        else:
            result = train(pairs, DPOConfig(**steps), setup, settings)
        results.append((logged(result), load_file(result.adapter / "adapter_model.safetensors")))
    (losses, adapter), (same_losses, same_adapter) = results
    assert len(losses) > 1
    assert same_losses == pytest.approx(losses, abs=1e-6)
    for name, weight in adapter.items():
        assert torch.allclose(same_adapter[name], weight, atol=1e-6), name
        # lora_B begins with zeros, and stays so without a gradient.
        assert weight.any(), name


def token_losses(model, batch):
    """Loss of each trained token, in the order of the batch."""
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return flat[labels[:, 1:].flatten() != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["small_llama", "base_model"])
def test_packed_rows_have_the_same_losses_as_separate_rows(kind, attention, rows, settings, request):
    # Long enough for several rows in each packed row.
    compute = CPU.model_copy(update={"attn_implementation": attention})
    setup = training_setup(request.getfixturevalue(kind), compute, max_length=1024)
    config = SFTConfig(**STEPS | {"per_device_train_batch_size": 1}, packing=True)
    run = prepared(rows, config, setup, settings)
    trainer = sft_trainer(run, run.load_policy(), config)
    assert len(trainer.train_dataset) <= 5
    model = load_model(setup.model, settings, run.device).eval()
    alone = {}
    for row in rows["train"]:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        alone[tuple(row["input_ids"])] = token_losses(model, batch)
    seen = 0
    for pack in trainer.train_dataset:
        starts = [sum(pack["seq_lengths"][:i]) for i in range(len(pack["seq_lengths"]))]
        members = [
            tuple(pack["input_ids"][start : start + length])
            for start, length in zip(starts, pack["seq_lengths"], strict=True)
        ]
        batch = trainer.data_collator([pack])
        assert "attention_mask" not in batch
        together = token_losses(model, dict(batch))
        assert torch.allclose(together, torch.cat([alone[member] for member in members]), atol=1e-4)
        seen += len(members)
    assert seen == 16


@pytest.mark.parametrize(("batch", "packing"), [(1, False), (3, False), (3, True), (8, True)])
def test_validation_loss_is_the_mean_over_trained_tokens(batch, packing, rows, setup, settings):
    config = SFTConfig(**STEPS | {"per_device_eval_batch_size": batch}, packing=packing)
    run = prepared(rows, config, setup, settings)
    trainer = sft_trainer(run, run.load_policy(), config)
    model = load_model(setup.model, settings, run.device).eval()
    alone = [
        token_losses(model, {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")})
        for row in rows["validation"]
    ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.cat(alone).mean().item(), abs=1e-4)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_losses_are_those_of_the_reference_run(stage, tmp_path, settings):
    """After an intended change of the losses, `python -m tests.renew_references` rewrites the reference files."""
    expected = json.loads((FOLDER / f"{stage}.json").read_text())
    assert losses(stage, tmp_path, settings) == {
        name: pytest.approx(values, abs=2e-4) for name, values in expected.items()
    }
