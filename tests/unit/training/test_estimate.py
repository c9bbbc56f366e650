"""The estimate of memory and time against hand-computed shapes, torch's operation counter and real processes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llm_engineering.models import device as devices
from llm_engineering.models.device import Device
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.online_blocks import GRPOConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from llm_engineering.training.estimate import (
    NF4_BYTES,
    OVERHEAD_BYTES,
    Shapes,
    batch_shape,
    flops_per_token,
    matmul_rate,
    peak_memory,
    remedy,
    shapes,
)
from tests.conftest import ROOT
from tests.tiny_models import SIZES
from tools import forecast
from tools.expected_rows import Source
from tools.forecast import estimate_lines, tokens_of, warn_of_memory
from tools.plan import stages_of
from tools.recipe_checks import check_machine

CPU = Device("cpu", torch.float32, "sdpa", [])
CARD = Device("cuda", torch.bfloat16, "sdpa", [])
STEPS = {
    "learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "save_steps": 4, "eval_steps": 4,
}  # fmt: skip
LORA = SFTConfig(**STEPS)
DPO = DPOConfig(**STEPS)
KTO = KTOConfig(**STEPS)
REWARD = RewardConfig(**STEPS)
# Sizes of the Llama in tests/tiny_models: two layers of width 32, four heads of size 8, two key heads, an MLP of width
# 64, 281 tokens.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
HEAD = 281 * 32
SHAPES = Shapes(
    weights=1000.0, trained=100, matmul=10**6, activations=8000, layers=4, hidden=16, hidden_bytes=2, vocabulary=50,
    attention_width=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(small_llama):
    return AutoConfig.from_pretrained(small_llama)


def test_shapes_are_those_of_the_model(tiny):
    found = shapes(tiny, "lora", LoraConfig(), CPU, 2, 16)
    rank = LoraConfig().r
    adapter = 2 * rank * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    norms = 5 * 32
    assert found.trained == adapter
    assert found.matmul == 2 * LAYER + HEAD
    assert found.weights == 4 * (2 * LAYER + 2 * HEAD + norms)
    assert (found.layers, found.hidden, found.vocabulary, found.attention_width) == (2, 32, 281, 2 * 4 * 8)
    half = shapes(tiny, "lora", LoraConfig(), CARD, 2, 16)
    assert half.weights == found.weights / 2
    assert half.trained == adapter
    assert half.activations < found.activations


def test_only_linear_layers_are_in_four_bits(tiny):
    found = shapes(tiny, "qlora", LoraConfig(), CARD, 2, 16)
    assert found.weights == pytest.approx(2 * LAYER * NF4_BYTES + 4 * (2 * HEAD + 5 * 32))
    assert pytest.approx(0.5159, abs=1e-4) == NF4_BYTES


def test_full_fine_tuning_trains_every_weight(tiny):
    found = shapes(tiny, "full", LoraConfig(), CARD, 2, 16)
    assert found.weights == 4 * found.trained == 4 * (2 * LAYER + 2 * HEAD + 5 * 32)


def test_activations_grow_with_tokens_and_eager_attention_with_their_square(tiny):
    def activations(attention, rows, length):
        return shapes(tiny, "lora", LoraConfig(), CPU._replace(attn_implementation=attention), rows, length).activations

    assert activations("sdpa", 4, 16) == pytest.approx(2 * activations("sdpa", 2, 16), rel=0.05)
    # With eager attention, the float32 probabilities of four heads in two layers grow with the square.
    square = {name: activations(name, 1, 512) - 2 * activations(name, 1, 256) for name in ("sdpa", "eager")}
    assert square["eager"] >= 2 * 256 * 256 * (2 * 4 * 4)
    # With sdpa, only the mask does: one number for each pair of tokens in each layer.
    assert square["sdpa"] <= 2 * 256 * 256 * (2 * 4)


def test_big_model_needs_no_memory_to_be_estimated():
    eight = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    config = LORA.model_copy(update={"gradient_checkpointing": True})
    found = shapes(eight, "lora", LoraConfig(), CARD, 2, 2048)
    # 8.03 billion weights in bfloat16. The input of each layer is kept: 2 · 2,048 · 4,096 · 2 bytes · 32 layers.
    assert found.weights == pytest.approx(8.03e9 * 2, rel=1e-3)
    memory = peak_memory(found, config, CARD, "lora", 2, 2048)
    assert memory.activations - found.activations / 32 == 2 * 2048 * 4096 * 2 * 32


@pytest.mark.parametrize(
    ("config", "method", "device", "expected"),
    [
        # base 1000 + trained 100 · 4 bytes; AdamW 2 · 400; activations 8000 + 8000/4; logits 16 · 20 · 50
        (LORA, "lora", CPU, (1400, 0, 0, 800, 10000, 16000)),
        (LORA.model_copy(update={"optim": "adamw_8bit"}), "lora", CARD, (1400, 0, 0, 200, 10000, 16000)),
        (LORA.model_copy(update={"gradient_accumulation_steps": 2}), "full", CPU, (1000, 0, 400, 800, 10000, 16000)),
        # 20 tokens · 16 wide · 2 bytes · 4 layers, and one layer
        (LORA.model_copy(update={"gradient_checkpointing": True}), "lora", CPU, (1400, 0, 0, 800, 4560, 16000)),
        # the reference: a second adapter, or a second model
        (DPO, "lora", CPU, (1400, 400, 0, 800, 10000, 16000)),
        (DPO, "full", CARD, (1000, 1000, 0, 800, 10000, 16000)),
        (KTO, "lora", CPU, (1400, 400, 0, 800, 10000, 16000)),
        # no reference and no logits
        (REWARD, "lora", CPU, (1400, 0, 0, 800, 10000, 0)),
    ],
)
def test_peak_is_the_sum_of_its_parts(config, method, device, expected):
    memory = peak_memory(SHAPES, config, device, method, 2, 10)
    assert memory[:-1] == expected
    assert memory.total == sum(expected) + OVERHEAD_BYTES[device.name]


@pytest.mark.parametrize(
    ("compute", "config", "expected"),
    [
        # As above, with adamw_8bit only where the optimiser is not sharded, and with all gradients during the backward pass.
        ({}, LORA, (1000, 0, 400, 200, 10000, 16000)),
        ({"distributed": "deepspeed", "zero_stage": 1}, LORA, (1000, 0, 400, 200, 10000, 16000)),
        ({"distributed": "deepspeed", "zero_stage": 2}, LORA, (1000, 0, 100, 200, 10000, 16000)),
        # a quarter of the weights, and one layer of four
        ({"distributed": "deepspeed", "zero_stage": 3}, LORA, (500, 0, 100, 200, 10000, 16000)),
        ({"distributed": "fsdp2"}, LORA, (500, 0, 100, 200, 10000, 16000)),
        # TRL takes a whole reference of a full model.
        ({"distributed": "fsdp2"}, DPO, (500, 1000, 100, 200, 10000, 16000)),
    ],
    ids=["ddp", "zero 1", "zero 2", "zero 3", "fsdp2", "a reference"],
)
def test_processes_hold_their_share_of_what_is_sharded(compute, config, expected, monkeypatch):
    monkeypatch.setattr(devices, "_has_bitsandbytes", lambda: True)
    shared = ComputeConfig.model_validate({"num_processes": 4, **compute})
    accumulates = config.model_copy(update={"gradient_accumulation_steps": 2, "optim": "auto"})
    assert peak_memory(SHAPES, accumulates, CARD, "full", 2, 10, shared)[:-1] == expected


def test_a_reward_model_has_no_output_layer_and_two_rows_for_a_pair():
    sizes = LlamaConfig(**SIZES, vocab_size=1000)
    writes, scores = (shapes(sizes, "lora", LoraConfig(), CPU, 2, 16, scores=scores) for scores in (False, True))
    # The output layer of 1,000 · 32 weights in float32 is replaced by a head with two labels, the default of a configuration.
    assert writes.weights - scores.weights == 4 * (1000 * 32 - 2 * 32)
    # The head is trained whole.
    assert scores.trained - writes.trained == 2 * 32
    assert batch_shape(REWARD, 16) == (2 * REWARD.per_device_train_batch_size, 16)


def test_dpo_with_unsloth_takes_the_logits_of_a_whole_batch():
    """TRL's branch without logits is not used there: 16 bytes for each of 2 · 300 tokens and each of 50 logits."""
    unsloth = CARD._replace(backend="unsloth")
    weighted = DPO.model_copy(update={"use_weighting": True})
    assert peak_memory(SHAPES, DPO, CARD, "lora", 2, 300).logits == 16 * 128 * 50
    assert peak_memory(SHAPES, DPO, unsloth, "lora", 2, 300).logits == 16 * 600 * 50
    assert peak_memory(SHAPES, LORA, unsloth, "lora", 2, 300).logits == 16 * 128 * 50
    assert weighted.library_arguments == {"use_weighting": True}
    assert peak_memory(SHAPES, weighted, CARD, "lora", 2, 300).logits == 16 * 600 * 50


def test_a_precomputed_reference_of_a_full_model_takes_no_memory():
    precomputed = DPO.model_copy(update={"precompute_ref_log_probs": True})
    assert peak_memory(SHAPES, precomputed, CARD, "full", 2, 10).reference == 0


def test_a_reward_model_adds_its_weights_in_the_precision_of_the_device():
    named, other = (
        GRPOConfig.model_validate({**STEPS, "rewards": [{"use": use}], "beta": 0.0})
        for use in ("reward_model", "stopped")
    )
    for device, size in ((CARD, 2), (CPU, 4)):
        found = [peak_memory(SHAPES, config, device, "lora", 2, 10).reference for config in (named, other)]
        assert found == [size * SHAPES.matmul, 0]


def test_gradients_count_if_activations_are_small():
    found = SHAPES._replace(trained=10_000, activations=8)
    memory = peak_memory(found, LORA, CPU, "full", 1, 1)
    assert memory.gradients + memory.activations + memory.logits == 40_000


def test_operations_are_those_that_torch_counts(small_llama, tiny):
    model = AutoModelForCausalLM.from_pretrained(small_llama, attn_implementation="eager")
    ids = torch.arange(64).reshape(1, 64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    found = shapes(tiny, "full", LoraConfig(), CPU, 1, 64)
    # Eager attention also computes the half that the causal mask hides.
    hidden = 3 * 4 * found.attention_width * 64 / 2
    assert 64 * (flops_per_token(found, LORA, "full", 64) + hidden) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_operations_depend_on_the_passes_through_the_model():
    forward, attention = 2 * SHAPES.matmul + 4 * 64 * 10 / 2, 4 * 64 * 10 / 2
    checkpointed = LORA.model_copy(update={"gradient_checkpointing": True})
    precomputed = DPO.model_copy(update={"precompute_ref_log_probs": True})
    assert flops_per_token(SHAPES, LORA, "full", 10) == 3 * forward
    assert flops_per_token(SHAPES, LORA, "lora", 10) == 2 * forward + attention
    assert flops_per_token(SHAPES, checkpointed, "full", 10) == 4 * forward
    assert flops_per_token(SHAPES, DPO, "lora", 10) == 3 * forward + attention
    assert flops_per_token(SHAPES, precomputed, "lora", 10) == 2 * forward + attention
    # The estimate of the KL divergence takes a pass of the model and one of the reference.
    unpaired = KTO.model_copy(update={"loss_type": "apo_zero_unpaired"})
    assert flops_per_token(SHAPES, KTO, "lora", 10) == 5 * forward + attention
    assert flops_per_token(SHAPES, unpaired, "lora", 10) == 3 * forward + attention
    assert batch_shape(KTO, 10) == (2, 10)


def test_real_peaks_are_within_a_quarter():
    """Train small models in separate processes that return freed memory to the system."""
    # `make test` has the C library keep freed memory.
    kept = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    environment = {name: value for name, value in os.environ.items() if name not in kept} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.estimate", "--small"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 4
    for case in cases:
        assert case["parts_by_used"] == pytest.approx(1, abs=0.25), case


def test_matmul_rate_is_a_rate():
    assert matmul_rate(CPU, seconds=0.05) > 1e8


def recipe(*overrides):
    device = ["compute.device=cpu", "compute.dtype=float32"]
    return load_recipe(ROOT / "configs" / "python_reference.yaml", [*device, *overrides])


def test_tokens_of_documents_and_of_files(tmp_path):
    for number in range(10):
        text = f"Lamp {number} stands on the table and gives light to the room."
        (tmp_path / f"{number}.txt").write_text(text)
    local = [f"documents.path={tmp_path}", "documents.passage_min_chars=20", "documents.passage_max_chars=1000"]
    tokens, source = tokens_of(recipe(*local), "sft")
    # Passages, questions of at most 32 tokens, and 30 tokens of the template. 70 % are for training.
    rows = Source(recipe(*local)).instructions
    length = len(text) / 4
    assert tokens == pytest.approx(0.7 * rows.about * (length + 32 + 30))
    assert source == f"{rows.about} rows of 10 passages, before the rules of the data"
    pairs, how = tokens_of(recipe(*local), "dpo")
    number = int(how.split()[0])
    assert 0 < number <= rows.about
    assert pairs == pytest.approx(0.7 * number * (length + 2 * (32 + 30) + 64))
    shared, _ = tokens_of(recipe(*local), "dpo", shares_prompts=True)
    assert shared == pytest.approx(0.7 * number * (length + (32 + 30) + 64))
    own = tmp_path / "rows.jsonl"
    own.write_text("x" * 4000)
    assert tokens_of(recipe(f"data.instructions={own}"), "sft") == (pytest.approx(700), "the size of rows.jsonl")
    assert tokens_of(recipe("data.instructions=owner/name"), "sft") is None


def test_dry_run_shows_needed_memory_time_and_free_memory(small_llama, monkeypatch, caplog):
    own = recipe(f"model.name_or_path={small_llama}", "formatting.chat_template=alpaca")
    text = "\n".join(estimate_lines(own, stages_of("retrain", own)))
    for words in ("On this machine (cpu, float32, transformers)", "sft: about", "dpo: about", "GiB are free"):
        assert words in text
    assert "passages, before the rules of the data): " in text
    assert "WARNING" not in text
    assert estimate_lines(own, stages_of("datasets", own)) == []

    # Two processes on a CPU need twice the memory, and share its cores.
    two = own.model_copy(update={"compute": own.compute.model_copy(update={"num_processes": 2})})
    assert "at its peak in each process" in estimate_lines(two, ["sft"])[1]
    monkeypatch.setattr(forecast, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(forecast, "matmul_rate", lambda device, seconds: 1e10)
    texts = ["\n".join(estimate_lines(made, ["sft"])) for made in (own, two)]
    one, both = (float(re.findall(r"may need ([0-9.]+) GiB", text)[0]) for text in texts)
    assert both == pytest.approx(2 * one, abs=0.15)
    assert len({re.findall(r"([0-9,]+) tokens a second", text)[0] for text in texts}) == 1

    text = "\n".join(estimate_lines(own, ["dpo"]))
    assert "WARNING: dpo may need" in text
    assert "lower dpo.per_device_train_batch_size and raise dpo.gradient_accumulation_steps by the same factor" in text
    with caplog.at_level("WARNING"):
        warn_of_memory(own, ["sft", "dpo"])
    assert [record.message.split()[0] for record in caplog.records if "may need" in record.message] == ["sft", "dpo"]


def test_recipe_for_a_gpu_is_estimated_without_one(small_llama):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    card = load_recipe(ROOT / "configs" / "cuda_8b.yaml", [f"model.name_or_path={small_llama}"])
    reason, where, memory, note = estimate_lines(card, ["sft"])
    assert "cannot train this recipe: compute.device is cuda" in reason
    assert where == "On another machine (cuda, bfloat16, transformers):"
    assert "at its peak" in memory
    assert "free" not in memory
    assert "unsloth" in note


def test_recipe_for_another_machine_does_not_depend_on_this_one(small_llama, caplog):
    cloud = load_recipe(ROOT / "configs" / "sagemaker_8b.yaml", [f"model.name_or_path={small_llama}"])
    where, memory, note = estimate_lines(cloud, ["sft"])
    assert where == "On ml.g5.2xlarge (cuda, bfloat16, transformers):"
    assert "free" not in memory
    assert "unsloth" in note
    with caplog.at_level("WARNING"):
        warn_of_memory(cloud, ["sft", "dpo"])
    assert caplog.records == []
    assert check_machine(cloud)
    assert not check_machine(load_recipe(ROOT / "configs" / "sagemaker_8b.yaml", ["compute.backend=auto"]))


def test_model_whose_configuration_is_missing_has_no_estimate():
    (line,) = estimate_lines(recipe("model.name_or_path=nobody/no-such-model"), ["sft"])
    assert line.startswith("No estimate: the configuration of nobody/no-such-model cannot be read (")


def test_remedies_do_not_include_settings_already_used():
    least = LORA.model_copy(update={"per_device_train_batch_size": 1, "gradient_checkpointing": True})
    assert remedy(least, "sft", "qlora") == "lower formatting.max_length"
    assert remedy(LORA, "sft", "full").count(";") == 3
