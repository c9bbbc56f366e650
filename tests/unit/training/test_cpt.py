"""Continued pre-training: packed texts, the stages after it, and the learning rate of the embeddings."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import CPTConfig, DPOConfig, SFTConfig
from llm_engineering.training import cpt
from llm_engineering.training.cpt import embedding_parameters
from tests.tiny_models import formatted, logged, train
from tests.unit.training.steps import interrupt

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {
    "learning_rate": 1e-2, "num_train_epochs": 1, "gradient_accumulation_steps": 1, "eval_steps": 100, "save_steps": 2,
    "logging_steps": 1,
}  # fmt: skip
CONFIG = CPTConfig(**STEPS, per_device_train_batch_size=2, packing=False)
ROWS = 12


@pytest.fixture
def rows(setup, settings, tmp_path):
    """A function that formats rows of a kind."""
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    return lambda kind: formatted(kind, ROWS, tokenizer, tmp_path)


def loss_of(model, data):
    """The mean loss over all trained tokens, from the logits of each row alone."""
    total, count = 0.0, 0
    model.eval()
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        count += int((labels != -100).sum())
    return total / count


def base(setup):
    return AutoModelForCausalLM.from_pretrained(setup.model.name_or_path, dtype=torch.float32)


def with_adapter(setup, folder):
    return PeftModel.from_pretrained(base(setup), folder)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_rows_of_a_batch_do_not_see_each_other(packing, rows, setup, settings):
    """The first loss, of one batch with all rows, is the loss of the rows alone."""
    data = rows("text")
    config = CONFIG.model_copy(update={"packing": packing, "per_device_train_batch_size": ROWS})
    result = train(data, config, setup, settings)
    assert logged(result)[0] == pytest.approx(loss_of(base(setup), data["train"]), abs=1e-5)
    assert result.summary["steps"] == 1
    assert all(label != -100 for row in data["train"] for label in row["labels"])


def test_sft_and_dpo_go_on_from_the_model_of_cpt(rows, setup, settings):
    config = CONFIG.model_copy(update={"num_train_epochs": 4.0})
    first = train(rows("text"), config, setup, settings)
    data = rows("instruction")
    # One batch has all rows, so that the first loss is that of the model before any update.
    whole = SFTConfig(**{**STEPS, "num_train_epochs": 3}, per_device_train_batch_size=ROWS, packing=False)
    second = train(data, whole, setup, settings, start=first.adapter)
    expected, of_base = loss_of(with_adapter(setup, first.adapter), data["train"]), loss_of(base(setup), data["train"])
    assert logged(second)[0] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - of_base) > 1e-2

    third = train(
        rows("preference"), DPOConfig(**STEPS, per_device_train_batch_size=4), setup, settings, start=second.adapter
    )
    assert logged(third)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    weights = [load_file(result.adapter / "adapter_model.safetensors") for result in (first, second, third)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


def test_a_text_with_an_untrained_token_is_refused(rows, setup, settings):
    data = rows("text")
    data["train"] = data["train"].map(lambda row: {"labels": [-100, *row["labels"][1:]]})
    with pytest.raises(WorkError, match="Row 0 .* not all of its tokens are trained"):
        train(data, CONFIG, setup, settings)


# The learning rate of the embeddings.

FULL = CONFIG.model_copy(update={"method": "full", "embedding_learning_rate": 1e-3, "weight_decay": 0.1})


@pytest.fixture
def optimisers(monkeypatch):
    """The optimiser of each run, with the names of the weights in its groups, and the rates of the groups in each step."""
    seen = []
    real = cpt.TextTrainer.create_optimizer

    def create_optimizer(self, model=None):
        optimizer = real(self, model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [sorted(names[id(parameter)] for parameter in group["params"]) for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        rates = []
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
        )
        seen.append((groups, decays, rates))
        return optimizer

    monkeypatch.setattr(cpt.TextTrainer, "create_optimizer", create_optimizer)
    return seen


def test_embeddings_have_a_learning_rate_of_their_own(rows, setup, settings, optimisers):
    data = rows("text")
    train(data, FULL, setup, settings)
    train(data, FULL.model_copy(update={"embedding_learning_rate": None}), setup, settings)
    (groups, decays, rates), (plain_groups, _, plain_rates) = optimisers
    embeddings = ["lm_head.weight", "model.embed_tokens.weight"]
    (place,) = [number for number, names in enumerate(groups) if "lm_head.weight" in names]
    assert groups[place] == embeddings
    # The embeddings keep the weight decay of the group that they were in.
    assert decays[place] == 0.1
    assert sorted(name for names in groups for name in names) == sorted(
        name for names in plain_groups for name in names
    )
    # The schedule scales both rates: it rises in the first steps and then falls.
    assert len(rates) == len(plain_rates) == ROWS // 2
    for own, plain in zip(rates, plain_rates, strict=True):
        assert len(set(plain)) == 1
        assert own[place] == pytest.approx(plain[0] * 0.1)
        assert {rate for number, rate in enumerate(own) if number != place} == {plain[0]}
    assert max(rate[place] for rate in rates) == pytest.approx(1e-3)
    assert rates[-1][place] < 1e-3


def test_embeddings_that_an_adapter_trains_whole_have_the_rate(rows, setup, settings, optimisers):
    lora = LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"])
    config = CONFIG.model_copy(update={"lora": lora, "embedding_learning_rate": 1e-3})
    train(rows("text"), config, setup, settings)
    ((groups, _, rates),) = optimisers
    (place,) = [number for number, names in enumerate(groups) if any("lm_head" in name for name in names)]
    assert [name.partition("modules_to_save")[0] for name in groups[place]] == [
        "base_model.model.lm_head.",
        "base_model.model.model.embed_tokens.",
    ]
    assert all("lora_" in name for number, names in enumerate(groups) if number != place for name in names)
    assert rates[2][place] == pytest.approx(rates[2][0] * 0.1)


def test_the_rate_moves_the_embeddings_less(rows, setup, settings):
    data, before = rows("text"), base(setup).state_dict()
    moved = []
    for rate in (1e-3, None):
        result = train(data, FULL.model_copy(update={"embedding_learning_rate": rate}), setup, settings)
        after = load_file(result.adapter / "model.safetensors")
        moved.append({name: (after[name] - before[name]).abs().max().item() for name in after})
    assert moved[0]["model.embed_tokens.weight"] < 0.2 * moved[1]["model.embed_tokens.weight"]
    layer = "model.layers.0.mlp.up_proj.weight"
    assert moved[0][layer] == pytest.approx(moved[1][layer], rel=0.5)


def test_tied_embeddings_are_one_weight(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert list(embedding_parameters(model).values()) == ["model.embed_tokens.weight"]


def test_a_resumed_run_with_the_rate_ends_like_an_uninterrupted_one(rows, setup, settings, tmp_path):
    data = rows("text")
    whole = train(data, FULL, setup, settings.model_copy(update={"llm_output_dir": tmp_path / "whole"}))
    interrupt(3, lambda: train(data, FULL, setup, settings))
    resumed = train(data, FULL, setup, settings)
    assert resumed.summary["resumed_from"] == "checkpoint-3"
    file = "model.safetensors"
    assert (resumed.adapter / file).read_bytes() == (whole.adapter / file).read_bytes()
    assert logged(resumed) == logged(whole)


def test_a_rate_without_trained_embeddings_is_refused(rows, setup, settings):
    config = CONFIG.model_copy(update={"embedding_learning_rate": 1e-3})
    with pytest.raises(RequestError, match="no embedding of this model is trained"):
        train(rows("text"), config, setup, settings)
