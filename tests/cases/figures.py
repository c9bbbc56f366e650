"""Figures that training, evaluation and export computed wrongly: each is measured on a model of two layers."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerControl, TrainerState, TrainingArguments

from benchmarks.architectures import measure
from benchmarks.coverage import ALONE, DOCUMENTS, HALF, RARE, count_covered
from llm_engineering.data.rows import Message
from llm_engineering.evaluation.models import Models
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device, choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.exports.gguf import write_gguf
from llm_engineering.publish.merge import Trained, merge, merged_device
from llm_engineering.publish.verification import HeldoutRow
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.recipe.training_blocks import TrainConfig
from llm_engineering.training import losses
from llm_engineering.training.dpo import dpo_trainer
from llm_engineering.training.estimate import Shapes, peak_memory
from llm_engineering.training.policy import new_policy, save_policy, trained_policy
from llm_engineering.training.processes import ranks
from llm_engineering.training.processes.job import TrainingResult
from llm_engineering.training.processes.ranks import Interruption
from llm_engineering.training.sft import sft_trainer
from llm_engineering.training.telemetry.flops import peak_flops
from llm_engineering.training.telemetry.work import peak_memory_bytes
from llm_engineering.training.training_run import TrainingRun
from tests.cases.case import CallCase, Case, FigureCase
from tests.renew_references import STEPS
from tests.tiny_models import CPU, SIZES, Kind, formatted, logged, tiny_tokenizer, train, training_setup, write_model

BF16 = CPU.model_copy(update={"dtype": "bfloat16"})
CHATML = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


class Bench:
    """A tiny Llama in a folder, with rows, and settings to train it.

    Args:
        method: `lora`, or `full` for full fine-tuning.
    """

    def __init__(self, folder: Path, compute: ComputeConfig = CPU, method: str = "lora") -> None:
        self.base = write_model(folder / "model", "llama")
        self.settings = Settings(_env_file=None, llm_output_dir=folder / "outputs", llm_cache_dir=folder / "cache")
        self.setup = training_setup(self.base, compute).model_copy(update={"method": method})
        self.tokenizer = load_tokenizer(self.setup.model, self.settings, "alpaca")
        self.device = choose_device(compute)
        self.folder = folder

    def run(self, stage: str, config: TrainConfig) -> TrainingRun[Any]:
        """A run on eight rows or pairs."""
        rows = formatted("instruction" if stage == "sft" else "preference", 8, self.tokenizer, self.folder)
        return TrainingRun(stage, rows, config, self.setup, self.settings, self.device, self.tokenizer)

    def sft(self, **options: Any) -> TrainingResult:
        """SFT with one step for two rows."""
        config = SFTConfig(**{**STEPS, "packing": False, **options})
        return train(self.run("sft", config).data, config, self.setup, self.settings)

    def policy(self) -> Any:
        """The model with a fresh adapter, or the model itself for full fine-tuning."""
        return new_policy(self.setup.model, LoraConfig(r=4), self.settings, self.device, self.setup.method)


def steps_with_two_cards(folder: Path) -> float:
    """Steps of one process that sees two cards: four batches of two rows."""
    real = TrainingArguments.__post_init__

    def with_two_cards(self: TrainingArguments) -> None:
        real(self)
        self._n_gpu = 2

    with mock.patch.object(TrainingArguments, "__post_init__", with_two_cards):
        return float(Bench(folder).sft().summary["steps"])


def first_precomputed_loss(folder: Path) -> float:
    """The first validation loss of DPO, whose policy is still the reference."""
    bench = Bench(folder, BF16)
    config = DPOConfig(**STEPS, precompute_ref_log_probs=True)
    return float(dpo_trainer(bench.run("dpo", config), bench.policy(), config).evaluate()["eval_loss"])


def loss_above_the_best(folder: Path) -> float:
    """The validation loss of the saved adapter less the lowest one of the run, which is not at a step that is saved anyway."""
    bench = Bench(folder)
    spoilt = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.9, "num_train_epochs": 5}
    result = bench.sft(**spoilt, load_best=True, early_stopping_patience=3, eval_steps=1, save_steps=4)
    bench.folder = bench.folder / "again"
    bench.folder.mkdir()
    config = SFTConfig(**STEPS, packing=False)
    policy = trained_policy(bench.setup.model, result.adapter, bench.settings, bench.device)
    found: float = sft_trainer(bench.run("sft", config), policy, config).evaluate()["eval_loss"]
    return found - min(logged(result, "eval_loss"))


def coverage(cells: tuple[float, ...], sizes: list[int], correlation: float) -> float:
    """The share of 95 % intervals that cover the true share of right answers."""
    return count_covered(cells, sizes, correlation, 200)["share"] / 200


def precision_of_probes(folder: Path) -> str:
    """The precision in which attention is computed before a full fine-tune starts."""
    seen = set()
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(str(value.dtype).removeprefix("torch."))
        return real(query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

    bench = Bench(folder, BF16, "full")
    config = SFTConfig(**STEPS, packing=False, method="full")
    # Without this, the attention of short rows on a CPU is computed by plain matrix products.
    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.multiple(losses, SHORT=0, TOGETHER=0),
    ):
        sft_trainer(bench.run("sft", config), bench.policy(), config)
    return ", ".join(sorted(seen))


def precision_of_qlora(folder: Path) -> str:
    """The precision of an adapter on a base model that counts as quantised."""
    bench = Bench(folder)
    policy, config = bench.policy(), SFTConfig(**STEPS, packing=False)
    policy.get_base_model().is_loaded_in_4bit = True
    sft_trainer(bench.run("sft", config), policy, config)
    return ", ".join({str(w.dtype).removeprefix("torch.") for w in policy.parameters() if w.requires_grad})


def sampling_of_the_merged_model(folder: Path) -> str:
    """The sampling that a merged model has from a base model that samples."""
    bench = Bench(folder)
    (bench.base / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    save_policy(bench.policy(), bench.setup.model, folder / "adapter")
    tiny_tokenizer(("<|endoftext|>",), CHATML).save_pretrained(folder / "adapter")
    rows = [HeldoutRow("row", [5, 6, 7, 8, 2], [-100, -100, 7, 8, 2])]
    trained = Trained(bench.setup.model, folder / "adapter")
    merge(trained, rows, bench.device, torch.float32, bench.settings, folder / "merged")
    written = json.loads((folder / "merged" / "generation_config.json").read_text())
    return f"do_sample {written.get('do_sample')}, temperature {written.get('temperature')}"


def card(name: str) -> Any:
    """A context in which torch finds a card of this name."""
    answers = {"is_available": True, "get_device_name": name, "is_bf16_supported": True}
    return mock.patch.multiple(torch.cuda, **{key: mock.Mock(return_value=value) for key, value in answers.items()})


def attention_of_serving() -> str:
    """The attention of a merged model whose recipe trains with flash attention."""
    with card("a card"), mock.patch("llm_engineering.models.device._is_installed", return_value=True):
        return f"attention {merged_device(ComputeConfig(attn_implementation='flash_attention_2')).attn_implementation}"


def late_signal() -> str:
    """Whether a signal that arrives while the processes agree stops the next step."""
    arguments, state, control = TrainingArguments("out", use_cpu=True), TrainerState(max_steps=9), TrainerControl()

    def maximum(value: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return value

    with Interruption() as interruption, mock.patch.object(os, "write"):
        with mock.patch.object(ranks, "maximum", maximum):
            interruption.on_step_end(arguments, state, control)
        interruption.on_step_end(arguments, state, control)
    return "stops" if control.should_training_stop else "lost"


def longest_row_of_gpt2(folder: Path) -> float:
    """Tokens of a prompt and its answer, in a context of 512 tokens."""
    base = write_model(folder / "model", "gpt2")
    setup = training_setup(base)
    settings = Settings(_env_file=None, llm_cache_dir=folder / "cache")
    model = load_model(setup.model, settings, choose_device(CPU))
    models = Models(model, {}, load_tokenizer(setup.model, settings, "alpaca"), batch_size=1)
    prompt = [Message(role="user", content="#" * 350)]
    return len(prompt_ids(prompt, models.tokenizer)) + len(models.answers("base", [prompt], 100)[0].ids)


def peak_of_an_l40() -> float:
    """The peak of an NVIDIA L40 in TFLOP/s."""
    with card("NVIDIA L40"):
        return (peak_flops(torch.device("cuda"), torch.bfloat16) or math.nan) / 1e12


def memory_on_macos() -> float:
    """Peak memory where the system reports 3,000,000."""
    usage = mock.Mock(ru_maxrss=3_000_000)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        mock.patch.object(resource, "getrusage", return_value=usage),
        mock.patch.object(sys, "platform", "darwin"),
    ):
        return peak_memory_bytes()


def logits_of_unsloth() -> float:
    """Bytes for each logit of DPO on unsloth, which computes those of a whole batch of 600 tokens and 50 logits."""
    shapes = Shapes(1000.0, trained=100, matmul=10**6, activations=8000, layers=4, hidden=16, hidden_bytes=2,
                    vocabulary=50, attention_width=64)  # fmt: skip
    unsloth = Device("cuda", torch.bfloat16, "sdpa", [], backend="unsloth")
    return peak_memory(shapes, DPOConfig(**STEPS), unsloth, "lora", 2, 300).logits / (600 * 50)


def head_width_in_gguf(folder: Path) -> float:
    """The width of the heads of a Llama whose heads are wider than its hidden size divided by their number."""
    base = write_model(folder / "model", Kind(LlamaConfig, SIZES | {"head_dim": 16}))
    tiny_tokenizer(("<|endoftext|>",), CHATML).save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(base)
    write_gguf(base, folder / "model.gguf", "m")
    field = GGUFReader(folder / "model.gguf").fields.get("llama.attention.key_length")
    return field.contents() if field else 8


def router_loss_left_out(folder: Path) -> float:
    """The loss of the trainer less that of a mixture of experts itself, in nats."""
    found = measure("Mixtral", folder)
    return float(found["sft_loss"] - found["plain_loss"])


LN_2 = (math.log(2) - 1e-5, math.log(2) + 1e-5)

FIGURES: list[Case] = [
    FigureCase("steps of one process that sees two cards", steps_with_two_cards, 4, 4, before="2"),
    FigureCase("the first loss of DPO with a precomputed reference", first_precomputed_loss, *LN_2, before="0.6948"),
    FigureCase("the saved checkpoint's loss above the best one", loss_above_the_best, -1e-5, 1e-5, before="0.0030"),
    FigureCase("95 % intervals, correlation 0", lambda: coverage(HALF, DOCUMENTS, 0.0), 0.9, 1, before="0.95"),
    FigureCase("95 % intervals, correlation 0.2", lambda: coverage(HALF, DOCUMENTS, 0.2), 0.9, 1, before="0.71"),
    FigureCase("95 % intervals, correlation 0.5", lambda: coverage(HALF, DOCUMENTS, 0.5), 0.9, 1, before="0.49"),
    FigureCase("95 % intervals, a share of 0.02", lambda: coverage(RARE, ALONE, 0.0), 0.9, 1, before="0.56"),
    CallCase("probes before a full fine-tune in bf16", precision_of_probes, "bfloat16", before="float32"),
    CallCase("the adapter on a quantised base", precision_of_qlora, "float32", before="bfloat16"),
    CallCase(
        "sampling of the merged model",
        sampling_of_the_merged_model,
        "do_sample False, temperature None",
        before="do_sample True, temperature 0.6",
    ),
    CallCase(
        "a recipe with flash attention, merged and served", attention_of_serving, "attention sdpa", before="refused"
    ),
    CallCase("a signal while the processes agree", late_signal, "stops", before="lost"),
    FigureCase("prompt and answer of GPT-2", longest_row_of_gpt2, 450, 512, before="IndexError"),
    FigureCase("the peak of an L40 in TFLOP/s", peak_of_an_l40, 181, 181, before="121"),
    FigureCase("peak memory on macOS", memory_on_macos, 3_000_000, 3_000_000, before="3072000000"),
    FigureCase("estimate of DPO's logits on unsloth, bytes each", logits_of_unsloth, 16, 16, before="3.4133"),
    FigureCase("the width of heads in GGUF", head_width_in_gguf, 16, 16, before="8, as llama.cpp assumes"),
    FigureCase(
        "the learning rate of a run of one step",
        lambda folder: logged(Bench(folder).sft(max_steps=1, warmup_steps=1), "learning_rate")[0],
        1e-2,
        1e-2,
        before="0",
    ),
    FigureCase("SFT loss of a mixture of experts", router_loss_left_out, -1e-5, 1e-5, before="-0.00201", slow=True),
    FigureCase(
        "the first loss of DPO with dropout in the model's config",
        lambda folder: measure("OPT", folder)["dpo_first_loss"],
        *LN_2,
        before="0.68999",
        slow=True,
    ),
]
