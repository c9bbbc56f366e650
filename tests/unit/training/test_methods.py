"""Full fine-tuning, LoRA variants, DPO losses, optimisers and the best checkpoint, on tiny models."""

import math

import pytest
import torch

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures import heldout_loss
from llm_engineering.evaluation.models import Models, labelled_rows
from llm_engineering.models import device as devices
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import check_training, choose_device, choose_optimiser
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.training_blocks import (
    DPOConfig,
    LoraConfig,
    SFTConfig,
)
from llm_engineering.training.dpo import dpo_trainer, train_dpo
from llm_engineering.training.policy import new_policy, trained_policy
from llm_engineering.training.sft import train_sft
from llm_engineering.training.train import TrainingRun
from tests.conftest import ROOT
from tests.renew_references import STEPS as REFERENCE_STEPS
from tests.tiny_models import formatted, logged, training_setup

STEPS = REFERENCE_STEPS | {"save_steps": 2, "eval_steps": 2}


@pytest.fixture
def setup(small_llama):
    return training_setup(small_llama)


@pytest.fixture
def tokenizer(setup, settings):
    return load_tokenizer(setup.model, settings, "alpaca")


@pytest.fixture
def rows(tokenizer, tmp_path):
    return formatted("instruction", 8, tokenizer, tmp_path)


@pytest.fixture
def pairs(tokenizer, tmp_path):
    return formatted("preference", 8, tokenizer, tmp_path)


def trained_sft(rows, setup, settings, **changes):
    return train_sft(rows, SFTConfig(**STEPS | changes), setup, settings)


def test_rslora_scales_by_the_root_of_r(setup, settings):
    device = choose_device(setup.compute)
    for use_rslora, scale in ((False, 32 / 16), (True, 32 / math.sqrt(16))):
        policy = new_policy(setup.model, LoraConfig(use_rslora=use_rslora), settings, device)
        scales = {m.scaling["default"] for m in policy.modules() if hasattr(m, "lora_A")}
        assert scales == {scale}


@pytest.mark.parametrize("method", ["dora", "full"])
def test_dpo_starts_from_the_sft_model_of_its_method(method, rows, pairs, tokenizer, setup, settings):
    changes = {"method": "full"} if method == "full" else {"lora": LoraConfig(use_dora=True)}
    setup = setup.model_copy(update={"method": changes.get("method", "lora")})
    sft = trained_sft(rows, setup, settings, **changes)
    losses = logged(sft)
    assert losses[-1] < losses[0]
    assert (sft.adapter / "config.json").is_file() == (method == "full")

    dpo = train_dpo(pairs, sft.adapter, DPOConfig(**STEPS), setup, settings)
    first = next(entry for entry in dpo.summary["history"] if "loss" in entry)
    # Policy and reference are both the SFT model, so neither answer is preferred yet.
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(math.log(2), abs=1e-5), 0)

    device = choose_device(setup.compute)
    base = load_model(setup.model, settings, device)
    models = Models(base, {"sft": sft.adapter, "dpo": dpo.adapter}, tokenizer, batch_size=2)
    heldout = labelled_rows(rows["validation"])
    measured = {name: heldout_loss(models.scores(name, heldout, "loss")).value for name in models.names}
    assert measured["base"] > measured["sft"] + 0.1
    assert len({round(loss, 6) for loss in measured.values()}) == 3
    # Evaluation measures the weights that were saved.
    again = trained_policy(setup.model, sft.adapter, settings, device, setup.method)
    alone = Models(again, {}, tokenizer, batch_size=2)
    alone.names, alone.model = ["sft"], again.eval()
    ids = torch.tensor([heldout[0][0]])
    with torch.inference_mode(), models.use("sft") as model:
        assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


EPSILON = 0.1
# Losses at the start, where policy and reference are equal: all log-ratios are 0. beta is 0.1.
AT_THE_START = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": (1 / 0.2) ** 2,
    "robust": math.log(2),
    "exo_pair": math.log(0.5) - (math.log(1 - EPSILON) + math.log(EPSILON)) / 2,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * (0.5 / 0.1) ** 2,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
}


def test_every_loss_starts_at_the_value_of_its_formula(rows, pairs, tokenizer, setup, settings):
    adapter = trained_sft(rows, setup, settings).adapter
    device = choose_device(setup.compute)
    named = DPOConfig.model_fields["loss_type"].annotation.__args__
    assert set(named) == set(AT_THE_START)
    starts = {}
    for name in named:
        smoothing = EPSILON if name in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
        config = DPOConfig(**STEPS, loss_type=name, label_smoothing=smoothing)
        policy = trained_policy(setup.model, adapter, settings, device)
        run = TrainingRun("dpo", pairs, config, setup, settings, device, tokenizer)
        starts[name] = dpo_trainer(run, policy, config).evaluate()["eval_loss"]
    assert starts == pytest.approx(AT_THE_START, abs=1e-4)


def test_precomputed_references_train_the_same(rows, pairs, tokenizer, setup, settings):
    adapter = trained_sft(rows, setup, settings).adapter
    histories = []
    for precomputed in (False, True):
        config = DPOConfig(**STEPS, precompute_ref_log_probs=precomputed)
        result = train_dpo(pairs, adapter, config, setup, settings)
        histories.append(logged(result))
    assert histories[1] == pytest.approx(histories[0], abs=1e-5)
    assert len(set(histories[0])) > 1


def test_a_run_ends_with_its_best_checkpoint(rows, tokenizer, setup, settings):
    """The learning rate grows until it ruins the model, so the last checkpoint is not the best."""
    spoilt = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.9, "num_train_epochs": 5}
    spoilt |= {"packing": False, "save_steps": 1, "eval_steps": 1}
    result = trained_sft(rows, setup, settings, **spoilt, load_best=True, early_stopping_patience=3)
    losses = logged(result, "eval_loss")
    best = losses.index(min(losses))
    assert best < len(losses) - 1
    assert result.summary["steps"] == len(losses) == best + 1 + 3 < 20
    base = load_model(setup.model, settings, choose_device(setup.compute))
    models = Models(base, {"sft": result.adapter}, tokenizer, batch_size=4)
    measured = heldout_loss(models.scores("sft", labelled_rows(rows["validation"]), "loss")).value
    assert measured == pytest.approx(min(losses), abs=1e-4)


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
