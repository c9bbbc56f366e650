"""What training tests share: the setup of the small Llama, and eight rows of each kind as token ids."""

import pytest

from llm_engineering.models.tokenizer import load_tokenizer
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
