"""What unit and integration tests share: the real tokenizer, and a tiny model made here."""

import functools
import gc
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
import torch

# Before huggingface_hub, ZenML and transformers are imported: they read their variables during the import.
os.environ["HF_HUB_OFFLINE"] = "1"
import tools.cli  # noqa: F401
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.recipe.settings import Settings
from tests.fakes.warm_python import warm_python
from tests.tiny_models import write_llama, write_model

# A store for each test process: the user's stays as it is, and no two processes create one at the same time.
_STORE = tempfile.TemporaryDirectory(prefix="zenml-")
os.environ |= {"ZENML_CONFIG_PATH": _STORE.name, "ZENML_LOCAL_STORES_PATH": _STORE.name}
# As in the tools: ZenML sets the root logger to what they ask of it, which is CRITICAL.
logging.getLogger("llm_engineering").setLevel(logging.INFO)
# PEFT and TRL write a model card with every checkpoint. Compiling its template takes longer than a training step.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tokenizer():
    """The real tokenizer and chat template of the embedded model."""
    return load_tokenizer(pin_revision(ModelConfig(name_or_path=EMBEDDED_MODEL)), Settings())


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """A folder with a Llama model of two small layers, random weights, and the real tokenizer."""
    return write_llama(tmp_path_factory.mktemp("tiny-model"), tokenizer)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """A folder with a GPT-2 of two small layers: no chat template, no pad token, one special token for everything."""
    return write_model(tmp_path_factory.mktemp("base-model"), "gpt2")


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory) -> Path:
    """A folder with a Llama of two small layers and the tokenizer of `base_model`: 300 tokens, so that it is fast."""
    return write_model(tmp_path_factory.mktemp("small-llama"), "llama")


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    """Settings without this machine's `.env`, writing to a temporary folder."""
    monkeypatch.setenv("LLM_OUTPUT_DIR", str(tmp_path / "outputs"))
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    return Settings()


@pytest.fixture(scope="session")
def cpu() -> ComputeConfig:
    """The same arithmetic on every machine."""
    return ComputeConfig(device="cpu", dtype="float32", attn_implementation="sdpa")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes with one thread: small matrices are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def job_python() -> Iterator[str]:
    """The variable PATH of jobs whose `python` has already imported the libraries."""
    with warm_python() as folder:
        yield f"{folder}:{os.environ['PATH']}"


def free_port() -> int:
    """A loopback port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt the libraries' objects from garbage collection: a collection that visits them takes about a second."""
    gc.collect()
    gc.freeze()
