"""Full fine-tuning, LoRA variants, optimisers and the best checkpoint, on tiny models."""

import math

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.observation import heldout_loss
from llm_engineering.evaluation.models import Models, labelled_rows
from llm_engineering.models import device as devices
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import check_training, choose_device, choose_optimiser
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.policy import new_policy, trained_policy
from llm_engineering.training.trainer.resumable import ResumableTrainer
from tests.conftest import ROOT
from tests.renew_references import STEPS as REFERENCE_STEPS
from tests.tiny_models import logged, train
from tests.unit.training.steps import break_off

STEPS = REFERENCE_STEPS | {"save_steps": 2, "eval_steps": 2}


def trained_sft(rows, setup, settings, **changes):
    return train(rows, SFTConfig(**STEPS | changes), setup, settings)


def test_rslora_scales_by_the_root_of_r(setup, settings):
    device = choose_device(setup.compute)
    for use_rslora, scale in ((False, 32 / 16), (True, 32 / math.sqrt(16))):
        policy = new_policy(setup.model, LoraConfig(use_rslora=use_rslora), settings, device)
        scales = {m.scaling["default"] for m in policy.modules() if hasattr(m, "lora_A")}
        assert scales == {scale}


@pytest.mark.parametrize("method", ["dora", "full"])
def test_dpo_starts_from_the_sft_model_of_its_method(method, rows, pairs, alpaca_tokenizer, setup, settings):
    changes = {"method": "full"} if method == "full" else {"lora": LoraConfig(use_dora=True)}
    setup = setup.model_copy(update={"method": changes.get("method", "lora")})
    sft = trained_sft(rows, setup, settings, **changes)
    losses = logged(sft)
    assert losses[-1] < losses[0]
    assert (sft.adapter / "config.json").is_file() == (method == "full")

    dpo = train(pairs, DPOConfig(**STEPS), setup, settings, start=sft.adapter)
    first = next(entry for entry in dpo.summary["history"] if "loss" in entry)
    # Policy and reference are both the SFT model, so neither answer is preferred yet.
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(math.log(2), abs=1e-5), 0)

    device = choose_device(setup.compute)
    base = load_model(setup.model, settings, device)
    models = Models(base, {"sft": sft.adapter, "dpo": dpo.adapter}, alpaca_tokenizer, batch_size=2)
    heldout = labelled_rows(rows["validation"])
    measured = {name: heldout_loss(models.scores(name, heldout, "loss")).value for name in models.names}
    assert measured["base"] > measured["sft"] + 0.1
    assert len({round(loss, 6) for loss in measured.values()}) == 3
    # Evaluation measures the weights that were saved.
    again = trained_policy(setup.model, sft.adapter, settings, device, setup.method)
    alone = Models(again, {}, alpaca_tokenizer, batch_size=2)
    alone.names, alone.model = ["sft"], again.eval()
    ids = torch.tensor([heldout[0][0]])
    with torch.inference_mode(), models.use("sft") as model:
        assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def evaluated_weights(monkeypatch):
    """A list to which each evaluation of a trainer appends the trained weights, under the names of the adapter's file."""
    weights = []
    real = ResumableTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        state = get_peft_model_state_dict(self.model, adapter_name="default")
        weights.append({name: weight.clone() for name, weight in state.items()})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "evaluate", evaluate)
    return weights


# The learning rate grows until it ruins an SFT model, so the last checkpoint is not the best.
SPOILT = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.9, "num_train_epochs": 5}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("save_steps", [1, 4])
def test_a_run_ends_with_its_best_checkpoint(stage, save_steps, rows, pairs, setup, settings, monkeypatch):
    start = trained_sft(rows, setup, settings, packing=False).adapter
    weights = evaluated_weights(monkeypatch)
    options = STEPS | SPOILT | {"save_steps": save_steps, "eval_steps": 1}
    options |= {"load_best": True, "early_stopping_patience": 3, "logging_steps": 100}
    if stage == "sft":
        result = train(rows, SFTConfig(**options, packing=False), setup, settings)
    else:
        # DPO is validated on exchanged answers, so the more it learns, the worse it is.
        exchanged = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
        pairs["validation"] = pairs["validation"].rename_columns(exchanged)
        result = train(pairs, DPOConfig(**options), setup, settings, start=start)
    losses = logged(result, "eval_loss")
    best = losses.index(min(losses))
    assert best < len(losses) - 1
    assert result.summary["steps"] == len(losses) == best + 1 + 3 < 20
    # The last step is logged too, so that the last loss is not that of the first.
    assert [e["step"] for e in result.summary["history"] if "loss" in e] == [1, result.summary["steps"]]
    # With save_steps 4, the best step is not one that is saved anyway.
    assert save_steps == 1 or (best + 1) % save_steps
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert [i for i, seen in enumerate(weights) if all(torch.equal(seen[name], saved[name]) for name in saved)] == [
        best
    ]


def test_a_resumed_run_ends_with_the_best_checkpoint_before_the_interruption(rows, setup, settings, monkeypatch):
    weights = evaluated_weights(monkeypatch)
    options = STEPS | SPOILT | {"save_steps": 4, "eval_steps": 1, "load_best": True, "packing": False}
    options |= {"early_stopping_patience": 3}

    break_off(9, lambda: train(rows, SFTConfig(**options), setup, settings))
    before = len(weights)
    result = train(rows, SFTConfig(**options), setup, settings)
    losses = {entry["step"]: entry["eval_loss"] for entry in result.summary["history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert result.summary["resumed_from"] == "checkpoint-8"
    assert best < 8
    assert best % 4
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert all(torch.equal(weights[:before][best - 1][name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["dpo.label_smoothing=0.1"], "label_smoothing has no effect with loss_type sigmoid"),
        (["dpo.loss_type=robust"], "loss_type robust needs label_smoothing above 0"),
        (["dpo.loss_type=exo_pair"], "1e-3"),
        (["dpo.loss_type=aot", "dpo.per_device_train_batch_size=1"], "must be above 1"),
        (["dpo.loss_type=sft"], "loss_type"),
        (["sft.load_best=true", "sft.save_steps=15"], "multiple of eval_steps"),
        (["sft.early_stopping_patience=2"], "set load_best to true"),
        (["sft.method=full", "sft.lora.r=8"], "sft.lora has no effect"),
        (["compute.attn_implementation=paged_attention"], "'sdpa', 'eager' or 'flash_attention_2'"),
    ],
)
def test_settings_without_effect_are_refused(sets, words):
    with pytest.raises(RequestError, match=words):
        load_recipe(ROOT / "configs" / "python_reference.yaml", sets)


def test_methods_and_optimisers_are_refused_without_their_requirements(setup, monkeypatch):
    cpu = choose_device(setup.compute)
    cuda = cpu._replace(name="cuda")
    with pytest.raises(RequestError, match=r"sft\.method is qlora, which needs CUDA and the package bitsandbytes"):
        check_training("sft", "qlora", "auto", cpu)
    with pytest.raises(RequestError, match=r"dpo\.optim is adamw_8bit"):
        check_training("dpo", "lora", "adamw_8bit", cpu)
    check_training("sft", "full", "auto", cpu)
    monkeypatch.setattr(devices, "_has_bitsandbytes", lambda: False)
    with pytest.raises(RequestError, match="qlora"):
        check_training("sft", "qlora", "auto", cuda)
    assert [choose_optimiser("auto", d)[0] for d in (cpu, cuda)] == ["adamw_torch", "adamw_torch_fused"]
    monkeypatch.setattr(devices, "_has_bitsandbytes", lambda: True)
    check_training("sft", "qlora", "adamw_8bit", cuda)
    assert [choose_optimiser("auto", d)[0] for d in (cpu, cuda)] == ["adamw_torch", "adamw_8bit"]
    assert choose_optimiser("adamw_torch", cuda)[0] == "adamw_torch_fused"
