"""Models of two small layers with a byte-level tokenizer of 300 tokens, and rows for them."""

from pathlib import Path

import torch
from datasets import DatasetDict
from llm_engineering.recipe.data_blocks import FormattingConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_dataset, preference_dataset
from llm_engineering.formatting.datasets import format_splits

END = "<|endoftext|>"


def write_model(folder: Path, kind: str) -> Path:
    """Save a `gpt2` or `llama` with random weights, the same each time, and its tokenizer."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model: PreTrainedModel
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4, **ends)
        model = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **ends,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerBase:
    bytes_to_tokens = Tokenizer(models.BPE())
    bytes_to_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_to_tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bytes_to_tokens.train_from_iterator(["What is the sum of these numbers? It is this."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_tokens,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        clean_up_tokenization_spaces=False,
    )


def instruction(number: int) -> InstructionRow:
    """A question with an answer of one of three lengths."""
    return InstructionRow(
        prompt=[Message(role="user", content=f"What is {number}?")],
        completion=[Message(role="assistant", content="It is this. " * (1 + number % 3))],
        source="s",
        origin="o",
    )


def pair(number: int) -> PreferenceRow:
    """A question with an answer and a worse one, of one of three lengths."""
    return PreferenceRow(
        prompt=[Message(role="user", content=f"What is {number}?")],
        chosen=[Message(role="assistant", content="It is this.")],
        rejected=[Message(role="assistant", content="What? " * (1 + number % 3))],
        source="s",
        origin="o",
    )


def formatted(kind: str, count: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> DatasetDict:
    """That many rows to train on, and four to validate with."""
    make, to_dataset = (instruction, instruction_dataset) if kind == "instruction" else (pair, preference_dataset)
    rows = [make(number) for number in range(count + 4)]
    ledger = Ledger()
    ledger.record(kind, len(rows), len(rows))
    splits = {"train": to_dataset(rows[:-4]), "validation": to_dataset(rows[-4:])}
    own = folder / kind
    own.mkdir()
    return format_splits(splits, kind, tokenizer, FormattingConfig(max_length=256), own, ledger)[0]
