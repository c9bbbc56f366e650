"""The benchmark for GPUs, run on a CPU with a model of two layers."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import AutoTokenizer

from benchmarks import random_llama, raw_unsloth, training_cuda
from benchmarks.last_epoch import LastEpoch
from llm_engineering.errors import RequestError
from tests.conftest import ROOT
from tests.fakes import unsloth as fake_unsloth

VOCABULARY = 49152
# Reports whether it was imported before transformers.
STUB = 'import sys\nraise ImportError("too late" if "transformers" in sys.modules else "unsloth came first")\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def made(folder):
    return random_llama.prepare("tiny", folder)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Make a fake unsloth importable in other processes."""
    (tmp_path / "unsloth.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_rows_have_the_same_tokens_as_in_the_scripts(made, folder, tokenizer):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    whole = [len(_ids(tokenizer, row["prompt"] + row["completion"], False)) for row in rows]
    prompts = [len(_ids(tokenizer, row["prompt"], True)) for row in rows]
    # The template writes a newline after the token that ends a turn. Our rows end with that token.
    whole = [count - 1 for count in whole]
    assert (made["rows"], made["tokens"], made["longest_row"]) == (16, sum(whole), max(whole))
    assert made["trained_tokens"] == sum(whole) - sum(prompts)
    assert len(set(whole)) > 8

    matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    body = 2 * sum(4 * a * b + 6 * 16 * (a + b) for a, b in matrices)
    attention = 6 * 2 * 64 * sum(n * n for n in whole)
    head = 4 * 64 * VOCABULARY * made["trained_tokens"]
    assert made["flops"] == body * sum(whole) + head + attention
    assert made["parameters"] == 2 * 64 * VOCABULARY + 2 * sum(a * b for a, b in matrices) + 5 * 64


def _ids(tokenizer, messages, generation):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)


def test_existing_model_and_rows_are_used_again(made, folder):
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert random_llama.prepare("tiny", folder) == made
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_sides_train_the_same_and_a_failing_side_is_named(made, folder, stub, settings):
    sides = ("plain", "ours_transformers", "raw_unsloth")
    result = training_cuda.measure(folder, "tiny", "lora", sides, cpu=True)
    plain, ours, raw = (result["sides"][side] for side in sides)
    assert (plain["steps"], raw) == (4, {"did_not_run": "ImportError: unsloth came first"})
    assert ours["device"] == {
        "device": "cpu", "dtype": ours["device"]["dtype"], "attn_implementation": "sdpa", "backend": "transformers"
    }  # fmt: skip
    assert ours["telemetry"]["padding_share"] == 0
    for side in (plain, ours):
        assert side["last_epoch_seconds"] < side["seconds"]
        assert side["tokens_per_second"] == made["tokens"] / side["last_epoch_seconds"]
        assert side["train_loss"] == pytest.approx(math.log(VOCABULARY), abs=0.1)
    ratio = plain["last_epoch_seconds"] / ours["last_epoch_seconds"]
    assert result["ours_transformers_tokens_per_second_over_plain"] == pytest.approx(ratio)
    assert result["ours_unsloth_tokens_per_second_over_raw_unsloth"] is None
    # The path of the model's folder is not published.
    assert {**result["rows"], "model": made["model"]} == made
    assert made["model"] not in json.dumps(result)
    assert result["card"]["name"] is None


def test_our_side_imports_unsloth_first(made, folder, stub):
    code = (
        "from llm_engineering.models import device as devices\n"
        "devices.choose_backend = lambda device, *_, **__: device._replace(backend='unsloth')\n"
        "from pathlib import Path\n"
        "from benchmarks.training_cuda import _ours\n"
        "_ours('ours_unsloth', Path('.'), 'lora')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert training_cuda._reason(done.returncode, done.stderr) == "ImportError: unsloth came first"


def test_the_unsloth_script_packs_and_trains(made, folder, monkeypatch, tmp_path, capsys):
    settings = {}

    def config(**given):
        settings.update(given)
        return trl.trainer.sft_config.SFTConfig(**given | {"optim": "adamw_torch", "use_cpu": True, "bf16": False})

    load = fake_unsloth.FastLanguageModel.from_pretrained
    unsloth = fake_unsloth.module()
    unsloth.FastLanguageModel = SimpleNamespace(
        from_pretrained=lambda model_name, **given: (
            load(model_name, **given)[0],
            AutoTokenizer.from_pretrained(model_name),
        ),
        get_peft_model=fake_unsloth.FastLanguageModel.get_peft_model,
    )
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.setattr(trl, "SFTConfig", config)
    rows = str(folder / "rows.jsonl")
    script = ["--model", made["model"], "--rows", rows, "--output", str(tmp_path), "--epochs", "2"]
    raw_unsloth.main([*script, "--batch", "2", "--max-length", "128"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    (_, loading), (_, adapter) = fake_unsloth.CALLS
    assert (loading["load_in_4bit"], loading["max_seq_length"]) == (False, 128)
    assert (adapter["r"], adapter["lora_alpha"], adapter["use_gradient_checkpointing"]) == (16, 32, "unsloth")
    assert (settings["packing"], settings["max_length"], settings["per_device_train_batch_size"]) == (True, 128, 2)
    # Two epochs with two packed rows of 128 tokens in a step: at least as many steps as the tokens fill, and fewer than
    # one for each row.
    assert math.ceil(made["tokens"] / 256) * 2 <= figures["steps"] < 16
    assert figures["last_epoch_seconds"] < figures["seconds"]
    assert figures["train_loss"] == pytest.approx(math.log(VOCABULARY), abs=0.1)


def test_only_the_last_epoch_is_timed(monkeypatch):
    clock, times = LastEpoch(), iter([0.0, 7.0, 10.0, 11.0, 13.0])
    monkeypatch.setattr("benchmarks.last_epoch._now", lambda: next(times))
    for event, loss in (
        ("epoch_begin", 0),
        ("step_end", 9.0),
        ("epoch_begin", 0),
        ("step_end", 3.0),
        ("step_end", 1.0),
    ):
        getattr(clock, f"on_{event}")()
        if event == "step_end":
            clock.on_log(logs={"loss": loss})
    clock.on_log(logs={"train_loss": 5.0})
    assert clock.figures() == {"last_epoch_seconds": 3.0, "train_loss": 2.0}


def test_ratios_compare_our_sides_with_their_peers():
    sides = {
        "plain": {"tokens_per_second": 2.0, "peak_memory_bytes": 8},
        "ours_transformers": {"tokens_per_second": 5.0, "peak_memory_bytes": 6, "mfu": 0.5},
        "raw_unsloth": {"did_not_run": "out of memory"},
        "ours_unsloth": {"tokens_per_second": 5.0, "peak_memory_bytes": 6, "mfu": 0.4},
    }
    found = training_cuda.ratios(sides)
    assert found["ours_transformers_tokens_per_second_over_plain"] == 2.5
    assert found["ours_transformers_peak_memory_bytes_over_plain"] == 0.75
    assert (found["ours_transformers_mfu"], found["ours_unsloth_mfu"]) == (0.5, 0.4)
    assert found["ours_unsloth_tokens_per_second_over_raw_unsloth"] is None
    assert found["ours_transformers_checkpointed_mfu"] is None


def test_reason_is_the_last_error_in_the_log():
    log = "loading: slowly\nTraceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA out of memory.\nbye\n"
    assert training_cuda._reason(1, log) == "torch.OutOfMemoryError: CUDA out of memory."
    assert training_cuda._reason(3, "nothing else\n\n") == "nothing else"
    assert training_cuda._reason(-9, log).startswith("ended by SIGKILL")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "needs a CUDA card, and torch finds none here. To test it without one, use --shape tiny --cpu"),
        (["--cpu"], "Use --shape tiny"),
        (["--shape", "tiny", "--cpu", "--write"], "say nothing about speed"),
    ],
)
def test_useless_options_are_refused(options, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["training_cuda", *options])
    assert training_cuda.main() == 2
    assert words in capsys.readouterr().err


def test_a_full_disk_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(random_llama.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**7))
    with pytest.raises(RequestError, match=r"0\.0 GB free.*--folder"):
        random_llama.prepare("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
