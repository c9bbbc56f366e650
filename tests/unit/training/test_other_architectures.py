"""Models with dropout from their config, without sdpa, or with a loss of their own: each has the loss of transformers and TRL."""

import math

import pytest
from transformers import LlamaConfig, MixtralConfig

from benchmarks.architectures import measure
from llm_engineering.errors import WorkError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, KTOConfig
from llm_engineering.training.losses import why_not_from_hidden_states
from llm_engineering.training.trainer import reference
from tests.renew_references import STEPS
from tests.tiny_models import CPU, SIZES, Kind, formatted, train, training_setup, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["OPT", "BLOOM", "Falcon", "Mixtral"])
def test_losses_are_those_of_transformers_and_the_merge_is_right(name, tmp_path):
    found = measure(name, tmp_path)
    assert found["sft_loss"] == pytest.approx(found["plain_loss"], rel=1e-6)
    assert found["dpo_first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["merge_difference"] < 1e-5


@pytest.mark.parametrize(
    ("kind", "block", "words"),
    [
        ("preference", DPOConfig, "DPO starts from its reference, so the reward margin of"),
        ("labelled", KTOConfig, r"KTO starts from its reference, so the reward of the \w+ answers of"),
    ],
)
def test_training_stops_if_policy_and_reference_differ_in_the_first_step(
    kind, block, words, tmp_path, settings, monkeypatch
):
    base = write_model(tmp_path / "model", Kind(LlamaConfig, SIZES | {"attention_dropout": 0.3}))
    setup = training_setup(base)
    rows = formatted(kind, 8, load_tokenizer(setup.model, settings, "alpaca"), tmp_path)
    monkeypatch.setattr(reference, "disable_dropout", lambda model: None)
    with pytest.raises(WorkError, match=f"{words} the first step must be 0, and it is"):
        train(rows, block(**STEPS), setup, settings)


def test_a_loss_of_the_models_own_needs_its_forward_pass(small_llama, settings, monkeypatch):
    model = load_model(ModelConfig(name_or_path=str(small_llama)), settings, choose_device(CPU))
    assert why_not_from_hidden_states(model, CPU) is None
    plain = model.loss_function
    monkeypatch.setattr(model, "loss_function", lambda *args, **kwargs: plain(*args, **kwargs) + 0.5, raising=False)
    assert why_not_from_hidden_states(model, CPU) == "the model adds another loss to that of the tokens"


def test_the_recipe_can_switch_the_routers_loss_off(tmp_path, settings):
    base = write_model(tmp_path / "model", Kind(MixtralConfig, SIZES | {"num_local_experts": 4}))
    model = load_model(ModelConfig(name_or_path=str(base)), settings, choose_device(CPU))
    assert "the experts' router" in str(why_not_from_hidden_states(model, CPU))
    assert why_not_from_hidden_states(model, CPU, 0.0) is None
