"""Which runs load shards only, and what transformers knows while the model is loaded. test_processes trains with FSDP2."""

import gc
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from llm_engineering.models import base_model
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device, choose_device
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.processes import sharding
from llm_engineering.training.processes.sharding import distributed_arguments, loads_shards, sharded_loading
from tests.tiny_models import CPU, training_setup

FSDP2 = ComputeConfig(num_processes=2, distributed="fsdp2")
ZERO_2, ZERO_3 = (ComputeConfig(num_processes=2, distributed="deepspeed", zero_stage=stage) for stage in (2, 3))
STEPS = {"learning_rate": 1e-3, "num_train_epochs": 1, "eval_steps": 2, "save_steps": 2}
BATCH = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
SFT, DPO = SFTConfig(**STEPS, **BATCH), DPOConfig(**STEPS, **BATCH)
CARD = Device("cuda", torch.bfloat16, "sdpa", [])


@pytest.mark.parametrize(
    ("compute", "config", "shards"),
    [
        (ComputeConfig(num_processes=2), SFT, False),
        (ZERO_2, SFT, False),
        (ZERO_3, SFT, True),
        (FSDP2, SFT.model_copy(update={"method": "full"}), True),
        (FSDP2, DPO, True),
        # TRL takes the reference's weights whole.
        (FSDP2, DPO.model_copy(update={"method": "full"}), False),
        (ZERO_3, DPO.model_copy(update={"precompute_ref_log_probs": True}), False),
    ],
)
def test_shards_are_loaded_where_the_weights_and_the_reference_are_sharded(compute, config, shards, tmp_path):
    assert loads_shards(config, training_setup(tmp_path, compute)) is shards


def test_fsdp2_sends_the_weights_of_the_main_process_only_if_the_others_read_none():
    assert [distributed_arguments(FSDP2, shards=shards)["fsdp_config"]["cpu_ram_efficient_loading"]
            for shards in (True, False)] == [True, False]  # fmt: skip


def test_zero_3_is_known_while_the_model_is_loaded_and_no_longer(tmp_path, monkeypatch):
    made = []

    class Arguments:
        def __init__(self, **values):
            made.append((values, weakref.ref(self)))

    monkeypatch.setattr(sharding, "TrainingArguments", Arguments)
    with sharded_loading(SFT, training_setup(tmp_path, ZERO_3), CARD):
        gc.collect()
        ((values, reference),) = made
        assert reference() is not None
    assert reference() is None
    assert values["deepspeed"]["zero_optimization"]["stage"] == 3
    sizes = (values["per_device_train_batch_size"], values["gradient_accumulation_steps"], values["bf16"])
    assert sizes == (3, 5, True)
    with sharded_loading(SFT, training_setup(tmp_path, CPU), CARD):
        assert len(made) == 1


@pytest.mark.parametrize("name", ["is_deepspeed_zero3_enabled", "is_fsdp_enabled"])
def test_a_model_that_is_sharded_is_not_moved_to_the_card(name, small_llama, settings, monkeypatch):
    moves = []
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda self, *arguments: moves.append(arguments))
    monkeypatch.setattr(base_model, "is_local_dist_rank_0", lambda: True)
    model = ModelConfig(name_or_path=str(small_llama))
    load_model(model, settings, choose_device(CPU))
    assert moves == [("cpu",)]
    monkeypatch.setattr(base_model, name, lambda: True)
    load_model(model, settings, choose_device(CPU))
    assert moves == [("cpu",)]
