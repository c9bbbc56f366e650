"""Models of two small layers with a byte-level tokenizer of 300 tokens, and rows and settings to train them."""

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, LabelledRow, Message, PreferenceRow, PromptRow, TextRow
from llm_engineering.data.storage import FEATURES, to_dataset
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainConfig, TrainingSetup
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.training_run import TrainingRun, prepare_run

Config = TypeVar("Config", bound=TrainConfig)

END = "<|endoftext|>"
CPU = ComputeConfig(device="cpu", dtype="float32", attn_implementation="sdpa")


class Kind(NamedTuple):
    """An architecture with the tokens and the chat template of its model family.

    Attributes:
        config: the class of the model's configuration.
        shape: arguments of the configuration, beside the vocabulary and the special tokens.
        tokens: special tokens, in the order of their ids. The tokenizer names the first one as the token that begins a
            text, and the last one as the token that ends it.
        template: the family's chat template in Jinja; None if it has none.
    """

    config: type[Any]
    shape: dict[str, Any]
    tokens: tuple[str, ...] = (END,)
    template: str | None = None


# A window is shorter than the rows, so that it changes what a token attends to.
WINDOW = 16
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "gpt2": Kind(GPT2Config, {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": Kind(LlamaConfig, SIZES),
    "llama3": Kind(
        LlamaConfig,
        SIZES,
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "qwen3": Kind(
        Qwen3Config,
        SIZES | {"head_dim": 16, "tie_word_embeddings": True},
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template="{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "gemma3": Kind(
        Gemma3TextConfig,
        SIZES
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        tokens=("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        template="{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "mistral": Kind(
        MistralConfig,
        SIZES | {"sliding_window": WINDOW},
        tokens=("<s>", "[INST]", "[/INST]", "</s>"),
        template="{{ bos_token }}{% for m in messages %}"
        "{{ m.content + '</s>' if m.role == 'assistant' else '[INST] ' + m.content + ' [/INST]' }}{% endfor %}",
    ),
    "phi3": Kind(
        Phi3Config,
        SIZES | {"sliding_window": WINDOW},
        tokens=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
}


def write_model(folder: Path, kind: str | Kind) -> Path:
    """Save a model of a kind, or of one of `KINDS`, and its tokenizer. Its random weights are the same in each call."""
    config, shape, tokens, template = KINDS[kind] if isinstance(kind, str) else kind
    tokenizer = tiny_tokenizer(tokens, template)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **shape, **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_llama(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a Llama with random weights and this tokenizer. Its weights are the same in each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(tokens: tuple[str, ...], template: str | None) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer. The first token begins a text, the last one ends it."""
    bytes_to_tokens = Tokenizer(models.BPE())
    bytes_to_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_to_tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_to_tokens.train_from_iterator(["What is the sum of these numbers? It is this."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_tokens,
        bos_token=tokens[0],
        eos_token=tokens[-1],
        unk_token=tokens[0],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def text(number: int) -> TextRow:
    """A document of one of three lengths, between 110 and 160 tokens of these tokenizers."""
    content = f"File {number}. " + "Is the sum of numbers this? It is. " * (9 + number % 3)
    return TextRow(text=content, source="s", origin="document", document=f"file {number}")


def instruction(number: int) -> InstructionRow:
    """A question and an answer of one of three lengths."""
    return InstructionRow(
        prompt=[Message(role="user", content=f"What is {number}?")],
        completion=[Message(role="assistant", content="It is this. " * (1 + number % 3))],
        source="s",
        origin="o",
    )


def pair(number: int) -> PreferenceRow:
    """A question, a chosen answer, and a rejected answer of one of three lengths."""
    return PreferenceRow(
        prompt=[Message(role="user", content=f"What is {number}?")],
        chosen=[Message(role="assistant", content="It is this.")],
        rejected=[Message(role="assistant", content="What? " * (1 + number % 3))],
        source="s",
        origin="o",
    )


def labelled(number: int) -> LabelledRow:
    """A question, and a good or a bad answer of one of three lengths."""
    return pair(number // 2).labelled()[number % 2]


def question(number: int) -> PromptRow:
    """A question with an accepted answer."""
    return PromptRow(
        prompt=[Message(role="user", content=f"What is {number}?" + " Is it?" * (number % 2))],
        answers=[f"It is {number}."],
        source="s",
        origin="o",
    )


def formatted(kind: str, count: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> DatasetDict:
    """`count` formatted rows for training, and four for validation."""
    make = {"text": text, "instruction": instruction, "preference": pair, "labelled": labelled, "prompt": question}[
        kind
    ]
    records = [make(number).record() for number in range(count + 4)]
    ledger = Ledger()
    ledger.record(kind, len(records), len(records))
    splits = {
        "train": to_dataset(records[:-4], FEATURES[kind]),
        "validation": to_dataset(records[-4:], FEATURES[kind]),
    }
    own = folder / kind
    own.mkdir()
    return format_splits(splits, kind, tokenizer, FormattingConfig(max_length=256), own, ledger)[0]


def training_setup(
    folder: Path, compute: ComputeConfig = CPU, max_length: int = 256, chat_template: str | None = "alpaca"
) -> TrainingSetup:
    """Settings for training the model of a folder, without trackers."""
    return TrainingSetup(
        model=ModelConfig(name_or_path=str(folder), revision="test"),
        max_length=max_length,
        chat_template=chat_template,
        compute=compute,
        tracking=TrackingConfig(comet="off"),
        seed=7,
    )


def job_of(config: TrainConfig, setup: TrainingSetup, **fields: Any) -> Job:
    """A job of the stage that a config is the block of. `fields` are the others of the job, e.g. `start`."""
    stage = next(stage.name for stage in STAGES.values() if stage.block is type(config))
    return Job(stage=stage, config=config.model_dump(), setup=setup, **fields)


def prepared(
    data: DatasetDict, config: Config, setup: TrainingSetup, settings: Settings, **fields: Any
) -> TrainingRun[Config]:
    """The run of a config, checked as before a training."""
    return prepare_run(job_of(config, setup, **fields), type(config), data, settings)


def train(
    data: DatasetDict, config: TrainConfig, setup: TrainingSetup, settings: Settings, **fields: Any
) -> TrainingResult:
    """Train the stage of a config in this process."""
    job = job_of(config, setup, **fields)
    result: TrainingResult = STAGES[job.stage].train_function()(job, data, settings)
    return result


def logged(result: TrainingResult, name: str = "loss") -> list[float]:
    """The values of a name in the history of a training run."""
    return [entry[name] for entry in result.summary["history"] if name in entry]
