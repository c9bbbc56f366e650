"""What unit and integration tests share: the real tokenizer, and a tiny model made here."""

import os
from pathlib import Path

import pytest
import torch

# Before ZenML and transformers are imported.
import tools.cli  # noqa: F401
from llm_engineering.config import EMBEDDED_MODEL, ComputeConfig, ModelConfig
from llm_engineering.models import load_tokenizer, pin_revision
from llm_engineering.settings import Settings

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tokenizer():
    """The real tokenizer and chat template of the embedded model."""
    return load_tokenizer(pin_revision(ModelConfig(name_or_path=EMBEDDED_MODEL)), Settings())


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """A folder with a Llama model of two small layers, random weights, and the real tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """A folder with a GPT-2 of two small layers: no chat template, no pad token, one special token for everything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bytes_to_tokens = Tokenizer(models.BPE())
    bytes_to_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_to_tokens.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bytes_to_tokens.train_from_iterator(["What is the sum of these numbers? It is this."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_tokens,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("base-model")
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    """Settings without this machine's `.env`, writing to a temporary folder."""
    monkeypatch.setenv("LLM_OUTPUT_DIR", str(tmp_path / "outputs"))
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    return Settings()


@pytest.fixture(scope="session")
def cpu() -> ComputeConfig:
    """The same arithmetic on every machine."""
    return ComputeConfig(device="cpu", dtype="float32", attn_implementation="sdpa")
