"""The base model and several adapters behind one server of vLLM."""

import json
import sys
from types import SimpleNamespace

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.conftest import ROOT
from tests.tiny_models import tiny_tokenizer
from tools.model_versions import signatures, versions
from tools.servers.serve import serve
from tools.servers.vllm import adapters_command, installed_vllm, side_by_side

RECIPE = load_recipe(ROOT / "configs" / "local.yaml")


@pytest.fixture
def version(tmp_path, monkeypatch):
    """Makes a version with an adapter, and returns it. Versions are found by their numbers."""
    made = {}
    monkeypatch.setattr(versions, "find_model", lambda recipe, number: made[number])
    monkeypatch.setattr(signatures, "check_signature", lambda version, part, settings: None)

    def make(number, base="org/base", added=None, end="<e>", template="{{ eos_token }}", **config):
        folder = tmp_path / f"adapter-{number}"
        tiny_tokenizer(("<s>", end), template).save_pretrained(folder)
        text = json.dumps({"r": 16, "use_dora": False, "modules_to_save": None, **config})
        (folder / "adapter_config.json").write_text(text)
        model = ModelConfig(name_or_path=base, revision="abc", new_special_tokens=added or [])
        made[number] = versions.Found(SimpleNamespace(number=number), "dpo", {"dpo": folder}, model)
        return made[number]

    return make


def test_vllm_of_this_environment_is_found_without_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert installed_vllm() is None
    program = tmp_path / "vllm"
    program.touch(mode=0o755)
    assert installed_vllm() == str(program)


def test_the_base_model_and_all_adapters_are_served_by_name(version, settings, tmp_path):
    found = version("5")
    version("3", rank_pattern={"q_proj": 48})
    adapters = side_by_side(found, ["3"], RECIPE, settings)
    assert adapters == {"handbook": tmp_path / "adapter-5", "handbook:3": tmp_path / "adapter-3"}
    command = adapters_command("vllm", found.base, tmp_path / "merged", adapters, 8123, "bfloat16", settings)
    merged = str(tmp_path / "merged")
    assert command == [
        *["vllm", "serve", "org/base", "--served-model-name", "org/base", "--dtype", "bfloat16", "--revision", "abc"],
        *["--tokenizer", merged, "--generation-config", merged],
        *["--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"],
        "--lora-modules",
        json.dumps({"name": "handbook", "path": f"{tmp_path}/adapter-5"}),
        json.dumps({"name": "handbook:3", "path": f"{tmp_path}/adapter-3"}),
        *["--override-generation-config", '{"temperature": 0.0}', "--host", "127.0.0.1", "--port", "8123"],
    ]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"base": "org/other"}, r'Version 3 was trained on .*"org/other".*, and version 5 on .*"org/base"'),
        ({"use_dora": True}, "handbook:3 was trained with use_dora true, which vLLM's adapters cannot have"),
        ({"modules_to_save": ["lm_head"]}, r'handbook:3 was trained with modules_to_save \["lm_head"\]'),
        ({"r": 1024}, "handbook:3 was trained with r 1024"),
        ({"template": "{{ bos_token }}"}, "Version 3 has another chat template or end token than version 5"),
        ({"end": "<end>"}, "Version 3 has another chat template or end token than version 5"),
    ],
)
def test_a_version_that_vllm_cannot_serve_beside_the_first_is_refused(version, settings, other, words):
    found = version("5")
    version("3", **other)
    with pytest.raises(RequestError, match=words):
        side_by_side(found, ["3"], RECIPE, settings)


def test_full_models_and_added_tokens_are_refused(version, settings, tmp_path):
    found = version("5")
    version("3")
    (tmp_path / "adapter-3" / "adapter_config.json").unlink()
    with pytest.raises(RequestError, match="handbook:3 is a full model and has no adapter"):
        side_by_side(found, ["3"], RECIPE, settings)
    with pytest.raises(RequestError, match=r"Version 6 has new tokens \(<x>\), which vLLM's adapters cannot have"):
        side_by_side(version("6", added=["<x>"]), ["3"], RECIPE, settings)


def test_several_versions_need_vllm(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_OUTPUT_DIR", str(tmp_path))
    with pytest.raises(RequestError, match=r"Only vLLM serves several versions side by side \(--also\)"):
        serve(str(ROOT / "configs" / "local.yaml"), port=8124, also="3")
