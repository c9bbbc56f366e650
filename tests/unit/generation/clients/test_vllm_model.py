"""vLLM as the engine of the local model: the requests that it gets ask for the same answers as transformers gives."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_engineering.errors import RequestError
from llm_engineering.generation.clients import open as opening
from llm_engineering.generation.clients.open import open_client
from llm_engineering.generation.types import Sampling
from llm_engineering.recipe.generation_blocks import ClientConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.fakes import vllm

QUESTIONS = [[{"role": "user", "content": f"Question {number}"}] for number in range(5)]
TEXTS = [f"Sentence: {'word ' * number}end.\nQuestion:" for number in (1, 7, 3)]


@pytest.fixture(scope="module")
def talking(tiny_model, tmp_path_factory):
    """The tiny model with larger weights: its own give the same token after every text."""
    folder = tmp_path_factory.mktemp("talking")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(3)
    for name, weights in model.named_parameters():
        torch.nn.init.normal_(weights, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def clients(talking, cpu, settings, tmp_path, monkeypatch):
    """A function that opens the tiny model with transformers and with vLLM. Both compute in float32 here."""
    vllm.install(monkeypatch)
    monkeypatch.setattr(opening, "check_vllm", lambda *arguments: None)
    model = ModelConfig(name_or_path=str(talking), revision="test")

    def both(trained=None, model=model):
        settings.llm_output_dir.mkdir(parents=True, exist_ok=True)
        engines = [ClientConfig(batch_size=2), ClientConfig(engine="vllm")]
        return [open_client(config, model, cpu, settings, None, trained) for config in engines]

    return both


@pytest.fixture
def adapter(talking, tmp_path):
    """A function that saves an adapter that changes answers."""

    def save(**changes):
        torch.manual_seed(0)
        config = LoraConfig(
            r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **changes
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(talking), config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def test_answers_are_those_of_transformers(clients):
    by_transformers, by_vllm = clients()
    expected = by_transformers.answer(QUESTIONS, Sampling(12), "answers")
    assert by_vllm.answer(QUESTIONS, Sampling(12), "answers") == expected
    assert any(answer.text for answer in expected)
    ended = by_transformers.answer(QUESTIONS, Sampling(12, stop=("a", "e")), "answers")
    assert by_vllm.answer(QUESTIONS, Sampling(12, stop=("a", "e")), "answers") == ended
    assert ended != expected
    # A change of the engine may change rounding, so neither takes the answers of the other from the store.
    assert by_vllm.identity == f"{by_transformers.identity}, by vLLM"


def test_completions_end_at_stop_strings_and_have_no_banned_words(clients):
    by_transformers, by_vllm = clients()
    free = by_transformers.complete(TEXTS, Sampling(8, stop=("\n",)), "questions")
    assert by_vllm.complete(TEXTS, Sampling(8, stop=("\n",)), "questions") == free
    words = [[answer.text.split()[0]] if answer.text else [] for answer in free]
    assert any(words)
    banned = by_transformers.complete(TEXTS, Sampling(8, stop=("\n",)), "questions", words)
    assert by_vllm.complete(TEXTS, Sampling(8, stop=("\n",)), "questions", words) == banned
    assert banned != free


def test_an_adapter_is_applied(clients, adapter):
    base, _ = clients()
    by_transformers, by_vllm = clients(adapter())
    expected = by_transformers.answer(QUESTIONS, Sampling(12), "answers")
    assert by_vllm.answer(QUESTIONS, Sampling(12), "answers") == expected
    assert base.answer(QUESTIONS, Sampling(12), "answers") != expected


def test_adapters_and_tokens_that_vllm_cannot_have_are_refused(clients, adapter, talking):
    with pytest.raises(RequestError, match="was trained with use_dora true.*--set generation.engine=transformers"):
        clients(adapter(use_dora=True))
    with pytest.raises(RequestError, match="model.new_tokens.*--set generation.engine=transformers"):
        clients(model=ModelConfig(name_or_path=str(talking), revision="test", new_tokens=["zyx"]))


def test_a_machine_without_a_card_is_refused(cpu, settings):
    with pytest.raises(RequestError, match="generation.engine needs CUDA and the package vllm.*=transformers"):
        open_client(ClientConfig(engine="vllm"), ModelConfig(), cpu, settings)


def test_the_engine_is_that_of_the_local_model():
    with pytest.raises(ValueError, match="engine has no effect with client openai"):
        ClientConfig(client="openai", model="m", engine="vllm")
