"""What training tests share: the setup of the small Llama, eight rows of each kind as token ids, and trained models."""

import pytest

from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.training.policy import save_policy
from tests.tiny_models import formatted, training_setup


@pytest.fixture(scope="session")
def setup(small_llama):
    return training_setup(small_llama)


@pytest.fixture
def alpaca_tokenizer(setup, settings):
    """The tokenizer of the small Llama with the template `alpaca`."""
    return load_tokenizer(setup.model, settings, "alpaca")


@pytest.fixture
def rows(alpaca_tokenizer, tmp_path):
    return formatted("instruction", 8, alpaca_tokenizer, tmp_path)


@pytest.fixture
def pairs(alpaca_tokenizer, tmp_path):
    return formatted("preference", 8, alpaca_tokenizer, tmp_path)


@pytest.fixture
def trained(monkeypatch):
    """The models of all trainings, as they are in memory at the end."""
    models = []

    def save_and_keep(policy, *args):
        models.append(policy.eval())
        save_policy(policy, *args)

    monkeypatch.setattr("llm_engineering.training.train.save_policy", save_and_keep)
    return models
