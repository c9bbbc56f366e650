"""Each architecture is trained and exported as its recipe says: attention, adapters, labels, both stages, merge, GGUF."""

import json
import math
from itertools import groupby

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import RequestError
from llm_engineering.formatting.datasets import format_rows, format_splits
from llm_engineering.formatting.labels import check_labels
from llm_engineering.formatting.render import render
from llm_engineering.formatting.template_check import check_chat_template
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.exports.gguf import write_gguf
from llm_engineering.publish.merge import Trained, merge
from llm_engineering.publish.verification import HeldoutRow
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.training.losses import (
    attend_by_row,
    keeps_rows_apart,
    row_lengths,
    take_loss_from_hidden_states,
    why_not_from_hidden_states,
)
from llm_engineering.training.policy import new_policy
from tests.conftest import ROOT
from tests.tiny_models import CPU, KINDS, WINDOW, logged, train, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ("llama3", "qwen3", "gemma3", "mistral", "phi3", "gpt2")
# Sliding windows are not the plain causal triangle, so these models keep their masks.
WITH_WINDOWS = ("gemma3", "mistral", "phi3")
# The recipes, each with the kind of its model. Gemma 3 and Phi-3 have no recipe, so python_reference.yaml trains them.
RECIPES = [
    ("python_reference", "llama3"),
    ("python_reference", "gemma3"),
    ("python_reference", "phi3"),
    ("cuda_8b", "llama3"),
    ("gpt2_alpaca", "gpt2"),
    ("llama31_8b_handbook", "llama3"),
    ("llama31_8b_unsloth", "llama3"),
    ("llama3_8b_unsloth_packing", "llama3"),
    ("qwen3_4b_unsloth", "qwen3"),
    ("smollm2_135m", "llama"),
    ("tinyllama_guanaco", "llama"),
    ("zephyr_7b", "mistral"),
]
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a model of each kind."""
    kinds = (*ARCHITECTURES, "llama")
    return {kind: write_model(tmp_path_factory.mktemp("architectures") / kind, kind) for kind in kinds}


@pytest.fixture
def loaded(folders, settings):
    """Loads the model of a kind as training does."""
    return lambda kind: load_model(ModelConfig(name_or_path=str(folders[kind])), settings, choose_device(CPU))


def three_rows():
    """Three rows of token ids. Two of them are longer than the sliding windows."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, 280, (length,), generator=generator) for length in (WINDOW + 9, 5, WINDOW + 4)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_have_the_same_logits_alone_and_concatenated(kind, loaded):
    rows = three_rows()
    positions = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    policy, plain = loaded(kind).eval(), loaded(kind).eval()
    by_row = attend_by_row(policy)
    assert by_row == (kind not in WITH_WINDOWS)
    assert keeps_rows_apart(policy, by_row)
    options = {"row_lengths": row_lengths(positions)} if by_row else {}
    with torch.inference_mode():
        alone = torch.cat([plain(row.unsqueeze(0)).logits[0] for row in rows])
        ids = torch.cat(rows).unsqueeze(0)
        together = policy(ids, position_ids=positions, use_cache=False, **options).logits[0]
        mixed = plain(ids, use_cache=False).logits[0]
    scale = float(alone.abs().max())
    assert torch.allclose(together, alone, rtol=0, atol=1e-5 * scale)
    # Rows that see each other have other logits.
    assert not torch.allclose(mixed, alone, rtol=0, atol=1e-2 * scale)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_loss_from_hidden_states_is_that_of_whole_logits(kind, loaded):
    ours, plain = loaded(kind).eval(), loaded(kind).eval()
    assert why_not_from_hidden_states(ours, CPU) is None
    take_loss_from_hidden_states(ours)
    ids = three_rows()[0].unsqueeze(0)
    labels = ids.clone()
    labels[:, :6] = -100
    outputs = ours(input_ids=ids, labels=labels)
    expected = plain(input_ids=ids, labels=labels).loss
    assert "logits" not in outputs
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    outputs.loss.backward()
    expected.backward()
    for (name, found), (_, wanted) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        if wanted.grad is not None:
            assert torch.allclose(found.grad, wanted.grad, rtol=1e-4, atol=1e-6), name


SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEAR_LAYERS = {
    "llama3": SEPARATE,
    "qwen3": SEPARATE,
    "gemma3": SEPARATE,
    "mistral": SEPARATE,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}


def linear_layers(model):
    """The names of all linear layers but the head."""
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    assert "lm_head" in linear
    return linear - {"lm_head"}


def adapted_layers(folder, lora, settings):
    """The names of the layers that get an adapter."""
    policy = new_policy(ModelConfig(name_or_path=str(folder)), lora, settings, choose_device(CPU))
    return {name.removeprefix("base_model.model.") for name, m in policy.named_modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_linear_adapts_each_linear_layer_but_not_the_head(kind, loaded, folders, settings):
    found = adapted_layers(folders[kind], LoraConfig(target_modules="all-linear"), settings)
    assert found == linear_layers(loaded(kind))
    # Both layers have all of them.
    assert len(found) == 2 * len(LINEAR_LAYERS[kind])
    assert all(name.endswith(tuple(LINEAR_LAYERS[kind])) for name in found)


@pytest.mark.parametrize(("name", "kind"), RECIPES)
def test_the_adapters_of_a_recipe_are_on_all_linear_layers_of_its_model(name, kind, loaded, folders, settings):
    lora = load_recipe(CONFIGS / f"{name}.yaml").sft.lora or LoraConfig()
    assert adapted_layers(folders[kind], lora, settings) == linear_layers(loaded(kind))


# A conversation of two answers, cut into the parts without labels and those with labels.
WRITTEN = {
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "It is this.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>",
    ],
    "qwen3": [
        "<|im_start|>user\nWhat is 3?<|im_end|>\n<|im_start|>assistant\n",
        "It is this.<|im_end|>",
        "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "So.<|im_end|>",
    ],
    "gemma3": [
        "<bos><start_of_turn>user\nWhat is 3?<end_of_turn>\n<start_of_turn>model\n",
        "It is this.<end_of_turn>",
        "\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "So.<end_of_turn>",
    ],
    "mistral": [
        "<s>[INST] What is 3? [/INST]",
        "It is this.</s>",
        "[INST] Why? [/INST]",
        "So.</s>",
    ],
    "phi3": [
        "<|user|>\nWhat is 3?<|end|>\n<|assistant|>\n",
        "It is this.<|end|>",
        "\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        "So.<|end|>",
    ],
    "gpt2": [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat is 3?\n\n### Response:\n",
        "It is this.<|endoftext|>",
        "\n\n### Instruction:\nWhy?\n\n### Response:\n",
        "So.<|endoftext|>",
    ],
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_and_their_end_tokens_are_trained_and_prompts_are_not(kind, folders, settings):
    template = "alpaca" if kind == "gpt2" else None
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folders[kind])), settings, template)
    check_chat_template(tokenizer)
    turns = [("user", "What is 3?"), ("assistant", "It is this."), ("user", "Why?"), ("assistant", "So.")]
    messages = [Message(role=role, content=content) for role, content in turns]
    row = InstructionRow(prompt=messages[:1], completion=messages[1:], source="s", origin="o")
    (tokens,) = render([row], tokenizer)
    parts = [
        (trained, [token for token, _ in part])
        for trained, part in groupby(
            zip(tokens.input_ids, tokens.labels, strict=True), key=lambda pair: pair[1] != -100
        )
    ]
    assert [(trained, tokenizer.decode(ids)) for trained, ids in parts] == [
        (trained, text) for trained, text in zip((False, True, False, True), WRITTEN[kind], strict=True)
    ]
    assert all(label in (-100, token) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))
    # The end of turn is one special token, and not the text of one. Gemma's tokenizer names another end token.
    end = WRITTEN[kind][3].removeprefix("So.")
    assert [ids[-1] for trained, ids in parts if trained] == [tokenizer.eos_token_id] * 2
    assert tokenizer.eos_token_id == KINDS[kind].tokens.index(end)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id or kind == "gpt2"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_row_that_spells_a_control_token_of_its_model_is_set_aside(kind, folders, settings):
    template = "alpaca" if kind == "gpt2" else None
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folders[kind])), settings, template)
    for token in KINDS[kind].tokens:
        messages = [Message(role="user", content=f"What is {token}?"), Message(role="assistant", content="So.")]
        row = InstructionRow(prompt=messages[:1], completion=messages[1:], source="s", origin="o")
        (formatted,) = format_rows([row], "instruction", tokenizer, FormattingConfig())
        assert formatted.rejected is not None, token
        assert formatted.rejected.reason == "special_token_in_text"


def question(number):
    return f"What is the sum of {number} and {number}?"


def answer(number):
    return f"It is {2 * number}. " * (1 + number % 3) + "So it is."


def conversation(number, text):
    return [{"role": "user", "content": question(number)}, {"role": "assistant", "content": text}]


# Records with the columns of the datasets that the recipes name. None stands for generated rows.
INSTRUCTIONS = {
    None: lambda n: {"messages": conversation(n, answer(n))},
    "HuggingFaceH4/ultrachat_200k#train_sft": lambda n: {
        "prompt": question(n), "prompt_id": str(n), "messages": conversation(n, answer(n)),
    },
    "HuggingFaceTB/smol-smoltalk#train": lambda n: {"messages": conversation(n, answer(n)), "source": "smol"},
    "mlabonne/FineTome-100k": lambda n: {
        "conversations": [{"from": "human", "value": question(n)}, {"from": "gpt", "value": answer(n)}],
        "source": "s", "score": 5.0,
    },
    "mlabonne/llmtwin#train": lambda n: {"instruction": question(n), "output": answer(n)},
    "timdettmers/openassistant-guanaco#train": lambda n: {"text": f"### Human: {question(n)}### Assistant: {answer(n)}"},
    "yahma/alpaca-cleaned": lambda n: {"instruction": question(n), "input": "", "output": answer(n)},
}  # fmt: skip
PREFERENCES = {
    None: lambda n: {"prompt": question(n), "chosen": answer(n), "rejected": f"I do not know {n}."},
    "HuggingFaceH4/ultrafeedback_binarized#train_prefs": lambda n: {
        "prompt": question(n), "prompt_id": str(n), "messages": conversation(n, answer(n)), "score_chosen": 8.0,
        "chosen": conversation(n, answer(n)), "rejected": conversation(n, f"I do not know {n}."), "score_rejected": 4.0,
    },
    "mlabonne/llmtwin-dpo#train": lambda n: {
        "prompt": question(n), "rejected": f"I do not know {n}.", "chosen": answer(n),
    },
}  # fmt: skip


def recipe_for(name, folder):
    """A recipe as it is, but for a model of a folder, on a CPU, and with one step on four rows."""
    file = CONFIGS / f"{name}.yaml"
    own = load_recipe(file)
    sets = [
        f"model.name_or_path={folder}",
        "compute.device=cpu",
        "compute.dtype=float32",
        "compute.backend=transformers",
        "tracking.comet=off",
    ]
    if own.sft.method == "qlora":
        sets.append("sft.method=lora")
    for stage, block in (("sft", own.sft), ("dpo", own.dpo)):
        # With warm-up, the learning rate of the first step is 0.
        warmup = "warmup_steps" if "warmup_steps" in block.library_arguments else "warmup_ratio"
        one_step = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, warmup: 0}
        sets += [f"{stage}.{key}={value}" for key, value in (one_step | {"optim": "auto"}).items()]
    return load_recipe(file, sets)


def splits_of(recipe, kind, tokenizer, folder):
    """Four rows to train on and two for validation, read and formatted as the recipe says."""
    folder.mkdir()
    record = (INSTRUCTIONS if kind == "instruction" else PREFERENCES)[getattr(recipe.data, f"{kind}s")]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record(number)) + "\n" for number in range(6)))
    rows = list(open_dataset(str(file), kind, recipe.data).rows)
    assert [row.prompt[-1].content for row in rows] == [question(number) for number in range(6)]
    assert [row.answers[0][-1].content for row in rows] == [answer(number) for number in range(6)]
    ledger = Ledger()
    ledger.record(kind, len(rows), len(rows))
    splits = {"train": rows_dataset(rows[:4], kind), "validation": rows_dataset(rows[4:], kind)}
    data, _ = format_splits(splits, kind, tokenizer, recipe.formatting, folder, ledger)
    check_labels(data, tokenizer, recipe.formatting.train_on_prompt)
    assert [len(data[name]) for name in ("train", "validation")] == [4, 2]
    return data


def mean_loss(folder, rows):
    """The loss of a model over the trained tokens of rows, each computed alone, with plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.inference_mode():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(cross_entropy(logits, labels, reduction="none")[labels != -100])
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize(("name", "kind"), RECIPES)
def test_a_recipe_trains_its_architecture_and_exports_it(name, kind, folders, settings, tmp_path):
    recipe = recipe_for(name, folders[kind])
    tokenizer = load_tokenizer(recipe.model, settings, recipe.formatting.chat_template)

    # One step of SFT
    rows = splits_of(recipe, "instruction", tokenizer, tmp_path / "instruction")
    sft = train(rows, recipe.sft, recipe.setup, settings)
    # The one step has all rows, so packing and padding do not change its loss. GPT-2 trains with dropout.
    dropout = kind == "gpt2"
    assert logged(sft) == [pytest.approx(mean_loss(folders[kind], rows["train"]), rel=2e-2 if dropout else 1e-5)]
    full = recipe.sft.method == "full"
    assert (sft.adapter / ("model.safetensors" if full else "adapter_model.safetensors")).is_file()
    if not full:
        weights = load_file(sft.adapter / "adapter_model.safetensors")
        assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)

    # One step of DPO, which starts from that model
    pairs = splits_of(recipe, "preference", tokenizer, tmp_path / "preference")
    dpo = train(pairs, recipe.dpo, recipe.setup, settings, start=sft.adapter)
    assert logged(dpo) == [pytest.approx(math.log(2), abs=1e-5)]
    assert logged(dpo, "rewards/margins") == [0]

    # Merge
    heldout = [HeldoutRow(row["id"], row["input_ids"], row["labels"]) for row in rows["validation"]]
    device = choose_device(recipe.compute)
    merged = tmp_path / "merged"
    verification = merge(Trained(recipe.model, dpo.adapter), heldout, device, torch.float32, settings, merged)
    assert verification.same_top == verification.tokens
    assert verification.largest_difference < 1e-4 < 10 * verification.mean_training_effect

    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])

    # GGUF
    config = AutoModelForCausalLM.from_pretrained(merged).config
    refused = {
        "mistral": "its attention has a window of 16 tokens",
        "gemma3_text": "it differs from Gemma 3 in its windows",
        **{kind: f"it is a {kind}" for kind in ("gpt2", "phi3")},
    }
    if config.model_type in refused:
        with pytest.raises(RequestError, match=refused[config.model_type]):
            write_gguf(merged, tmp_path / "model.gguf", name)
        return
    write_gguf(merged, tmp_path / "model.gguf", name)
    # transformers reads no head width of Qwen3 from the file.
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, config=config)
    ids = three_rows()[0].unsqueeze(0)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(read(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_each_recipe_is_trained_here_or_trains_as_one_that_is():
    def trained(recipe):
        return recipe.sft, recipe.dpo, recipe.formatting, recipe.data

    tested = [trained(load_recipe(CONFIGS / f"{name}.yaml")) for name, _ in RECIPES]
    for file in CONFIGS.glob("*.yaml"):
        recipe = load_recipe(file)
        # These tests train SFT and DPO. A recipe with another chain is for the embedded model.
        if recipe.chain == ["sft", "dpo"]:
            assert trained(recipe) in tested, f"add {file.name} to RECIPES"
