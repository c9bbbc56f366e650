"""The choice of the backend that loads the model, the arguments of unsloth, and its import before transformers."""

import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models import device as devices
from llm_engineering.models.device import Device, choose_backend, choose_device, keys_beyond_unsloth, needs_own_process
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training import training_run
from llm_engineering.training.unsloth_policy import check_packable, check_packed
from tests.conftest import ROOT
from tests.fakes import unsloth as fake_unsloth
from tests.renew_references import STEPS
from tests.tiny_models import train

CARD = Device("cuda", torch.bfloat16, "sdpa", ["device cuda: a card"])


@pytest.fixture
def installed(monkeypatch):
    """A machine with a GPU, with unsloth and its requirements."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_is_installed", lambda package: True)


def test_auto_chooses_unsloth_if_it_is_installed(installed):
    chosen = choose_backend(CARD, ComputeConfig(), "qlora")
    assert chosen.backend == "unsloth"
    assert chosen.reasons[-1].startswith("backend unsloth: it is installed")
    assert choose_backend(CARD, ComputeConfig(backend="transformers"), "qlora") == CARD


@pytest.mark.parametrize(
    ("changes", "method", "keys", "words"),
    [
        ({}, "lora", ["use_dora"], "it has no sft.lora.use_dora"),
        ({"dtype": "float32"}, "lora", [], "16 bits"),
        ({"attn_implementation": "eager"}, "lora", [], "compute.attn_implementation is eager"),
    ],
)
def test_recipe_that_unsloth_cannot_train_uses_transformers_or_is_refused(changes, method, keys, words, installed):
    device = CARD._replace(dtype=getattr(torch, changes.get("dtype", "bfloat16")))
    chosen = choose_backend(device, ComputeConfig(**changes), method, adapter_keys=keys)
    assert chosen.backend == "transformers"
    assert words in chosen.reasons[-1]
    with pytest.raises(RequestError, match=f"{words}.*compute.backend=transformers"):
        choose_backend(device, ComputeConfig(**changes, backend="unsloth"), method, adapter_keys=keys)


def test_new_tokens_are_trained_with_transformers(installed):
    chosen = choose_backend(CARD, ComputeConfig(), "lora", new_tokens=["<tool>"])
    assert chosen.reasons[-1].endswith("unsloth is not used, because it does not train the new token <tool>")


def test_full_fine_tuning_uses_unsloth_only_if_the_recipe_names_it(installed):
    assert choose_backend(CARD, ComputeConfig(), "full").backend == "transformers"
    assert choose_backend(CARD, ComputeConfig(backend="unsloth"), "full").backend == "unsloth"


def test_unsloth_is_refused_without_a_gpu_or_the_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = Device("cpu", torch.bfloat16, "sdpa", [])
    with pytest.raises(RequestError, match="needs a CUDA card, and torch finds none"):
        choose_backend(cpu, ComputeConfig(backend="unsloth"), "lora")
    assert (
        "unsloth is not used, because it needs a CUDA card" in choose_backend(cpu, ComputeConfig(), "lora").reasons[-1]
    )
    monkeypatch.setattr(devices, "_is_installed", lambda package: False)
    with pytest.raises(RequestError, match=r"not installed \(pip install 'llm-engineering\[gpu\]'\)"):
        choose_backend(CARD, ComputeConfig(backend="unsloth"), "lora")


def test_only_unsloth_needs_its_own_process(installed):
    assert needs_own_process(ComputeConfig())
    assert needs_own_process(ComputeConfig(backend="unsloth"))
    assert not needs_own_process(ComputeConfig(backend="transformers"))
    assert not needs_own_process(ComputeConfig(device="cpu"))


def test_without_a_gpu_no_process_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not needs_own_process(ComputeConfig())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compute.device=cpu"], "needs CUDA, and compute.device is cpu"),
        (["sft.lora.use_dora=true"], "unsloth has no sft.lora.use_dora"),
        (["sft.lora.init_lora_weights=pissa"], "unsloth has no sft.lora.init_lora_weights"),
        (["sft.method=full"], "set sft.packing to false"),
    ],
)
def test_recipe_that_names_unsloth_and_does_not_fit_is_refused(overrides, words):
    with pytest.raises(RequestError, match=words):
        load_recipe(ROOT / "configs" / "python_reference.yaml", ["compute.backend=unsloth", *overrides])


def test_unsloth_is_imported_before_the_libraries_that_it_patches(tmp_path):
    package = tmp_path / "unsloth"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\nfor name in ('transformers', 'peft', 'trl'):\n    assert name not in sys.modules, name\nprint('first')\n"
    )
    code = (
        "import torch\nfrom llm_engineering.models.device import Device, import_backend\n"
        "import llm_engineering.recipe.loading\n"
        "from llm_engineering.recipe.settings import Settings\n"
        "import_backend(Device('cuda', torch.bfloat16, 'sdpa', [], 'unsloth'), Settings().llm_cache_dir)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "first\n"


@pytest.fixture
def fake(monkeypatch):
    """Train with a fake unsloth on the CPU."""
    monkeypatch.setitem(sys.modules, "unsloth", fake_unsloth.module())
    monkeypatch.setattr(training_run, "choose_backend", lambda device, *_, **__: device._replace(backend="unsloth"))
    return fake_unsloth.CALLS


def test_both_backends_save_the_same_adapter(fake, rows, pairs, setup, settings, tmp_path, monkeypatch):
    config = SFTConfig(**STEPS, packing=False, gradient_checkpointing=True, lora=LoraConfig(r=4, use_rslora=True))
    trained = train(rows, config, setup, settings)
    after = train(pairs, DPOConfig(**STEPS), setup, settings, start=trained.adapter)

    (_, loading), (_, adapter), (_, reloading), (_, readapter) = fake
    assert {**loading} == {
        "model_name": setup.model.name_or_path, "max_seq_length": 256, "dtype": torch.float32, "load_in_4bit": False,
        "full_finetuning": False, "token": None, "fix_tokenizer": False, "trust_remote_code": False,
        "use_gradient_checkpointing": "unsloth", "revision": None, "use_exact_model_name": True,
        "float32_mixed_precision": None, "random_state": 7,
    }  # fmt: skip
    assert adapter == {
        "r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "bias": "none",
        "use_rslora": True, "use_gradient_checkpointing": "unsloth", "random_state": 7,
    }  # fmt: skip
    # DPO keeps the shape of the adapter, and its config has no checkpointing.
    targets = {name.rpartition(".")[2] for name in readapter["target_modules"]}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (readapter["r"], readapter["use_rslora"]) == (4, True)
    assert reloading["use_gradient_checkpointing"] is readapter["use_gradient_checkpointing"] is False
    assert trained.summary["device"]["backend"] == "unsloth"
    # The reference is the trained SFT adapter, not a fresh one.
    first = next(entry for entry in after.summary["history"] if "loss" in entry)
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(math.log(2), abs=1e-5), 0)
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in (trained.adapter, after.adapter))
    moved = max(float((start[name] - end[name]).abs().max()) for name in start)
    assert 0 < moved < 0.1

    # An adapter with another key of PEFT is trained further with transformers.
    assert keys_beyond_unsloth(trained.adapter) == []
    saved_config = json.loads((trained.adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved_config | {"lora_bias": True, "use_dora": True}))
    assert keys_beyond_unsloth(tmp_path) == ["use_dora", "lora_bias"]

    monkeypatch.undo()
    other = train(rows, config, setup, settings)
    assert other.summary["device"]["backend"] == "transformers"
    saved = load_file(other.adapter / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in start.items()}
    configs = [json.loads((r.adapter / "adapter_config.json").read_text()) for r in (trained, other)]
    assert configs[0]["base_model_name_or_path"] == setup.model.name_or_path
    assert {**configs[0], "target_modules": 0} == {**configs[1], "target_modules": 0}


def test_adapter_that_does_not_fit_is_named(fake, rows, pairs, setup, settings):
    trained = train(rows, SFTConfig(**STEPS, packing=False), setup, settings)
    config = trained.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj"]}))
    with pytest.raises(WorkError, match="does not fit the model that unsloth built"):
        train(pairs, DPOConfig(**STEPS), setup, settings, start=trained.adapter)


def test_full_fine_tuning_asks_for_float32_weights(fake, rows, setup, settings):
    train(rows, SFTConfig(**STEPS, packing=False, method="full"), setup, settings)
    ((name, loading),) = fake
    assert (name, loading["full_finetuning"], loading["float32_mixed_precision"]) == ("from_pretrained", True, True)


def test_packed_batches_without_lengths_end_before_training(fake, rows, setup, settings):
    with pytest.raises(WorkError, match="do not have the lengths of the packed rows"):
        train(rows, SFTConfig(**STEPS, packing=True), setup, settings)


def test_packed_lengths_must_be_those_of_the_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    check_packed({"position_ids": positions, "packed_seq_lengths": torch.tensor([3, 2, 1], dtype=torch.int32)})
    for lengths in ({}, {"packed_seq_lengths": torch.tensor([6])}, {"packed_seq_lengths": torch.tensor([3, 3])}):
        with pytest.raises(WorkError, match="would see each other"):
            check_packed({"position_ids": positions, **lengths})
    check_packable("llama", "sft")
    with pytest.raises(RequestError, match="no packed forward for models of type gpt2"):
        check_packable("gpt2", "sft")


def test_training_without_the_early_import_is_refused(rows, setup, settings, monkeypatch):
    monkeypatch.setattr(training_run, "choose_backend", lambda device, *_, **__: device._replace(backend="unsloth"))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(WorkError, match="imported before transformers"):
        train(rows, SFTConfig(**STEPS, packing=False), setup, settings)


def test_device_of_evaluation_is_transformers(cpu):
    assert choose_device(cpu).backend == "transformers"


# Without a GPU, importing unsloth does not replace TRL's trainers. This script calls the function that replaces them.
REAL = """
import unsloth, inspect, json
from unsloth.models.rl import _patch_trl_rl_trainers_impl
for name in ("sft_trainer", "dpo_trainer"):
    _patch_trl_rl_trainers_impl(name)
import transformers
from llm_engineering.training import dpo, sft
from llm_engineering.training.trainer.resumable import ResumableTrainer
stages = (sft.FormattedSFTTrainer, dpo.FormattedDPOTrainer)
# The class of unsloth, and the one below it, whose source unsloth has rewritten.
bases = [[base for base in stage.__mro__ if "Unsloth" in base.__name__] for stage in stages]
own = [n for n, f in vars(ResumableTrainer).items() if inspect.isfunction(f) and hasattr(transformers.Trainer, n)]
print(json.dumps({
    "bases": [classes[0].__name__ for classes in bases],
    "overridden": own,
    "lost": [n for stage in stages for n in own if getattr(stage, n) is not getattr(ResumableTrainer, n)],
    "prepared": dpo.DPOTrainer._prepare_dataset is not None,
    "counted": ["_total_train_tokens" in inspect.getsource(classes[1]) for classes in bases],
    "from_pretrained": list(inspect.signature(unsloth.FastLanguageModel.from_pretrained).parameters),
    "get_peft_model": list(inspect.signature(unsloth.FastLanguageModel.get_peft_model).parameters),
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed (extra `gpu`)")
def test_the_installed_unsloth_has_the_functions_that_are_used(tmp_path):
    environment = {**os.environ, "UNSLOTH_ALLOW_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bases"] == ["UnslothSFTTrainer", "UnslothDPOTrainer"]
    assert {"training_step", "_get_grad_norm", "_save_checkpoint", "_get_train_sampler"} <= set(found["overridden"])
    assert found["lost"] == []
    assert found["prepared"]
    assert found["counted"] == [True, True]
    for name in ("from_pretrained", "get_peft_model"):
        used = inspect.signature(getattr(fake_unsloth.FastLanguageModel, name)).parameters
        assert set(used) <= set(found[name])
