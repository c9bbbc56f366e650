"""Compares generated answers with a plain transformers script and with the limits of the machine:

    python -m benchmarks.generation [--cpu-time] [--write]

Both sides answer the same 128 questions of the embedded exam greedily, in one process, one after the other: with the base
model, with an adapter, and with the base model and passages before the questions. The adapter is trained first, on the exam
itself, so that its answers are short, as those of a trained model are.

- `plain`: `generate` of transformers as people write it, in padded batches of ten;
- `ours`: `Models.complete` as the exam calls it, with the batch sizes of the default recipe.

In half precision, a few answers of the two sides differ by rounding. The figures have the number of equal answers, and how close
the logits of the two tokens are where two answers part.

The limit is the shortest time for the tokens of `ours` in its batches, without padding: for each pass, the greater of the time
for its operations and the time to read the weights, the keys and the values. The speeds of matrix products and of memory are
measured here. Seconds are those of a clock, or with `--cpu-time`, where other work shares the machine, those of the processor.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.machine import machine, show
from llm_engineering.data.rows import Message
from llm_engineering.documents.passages import chunks
from llm_engineering.documents.read import read_documents
from llm_engineering.evaluation.measures.exam import Exam, open_exam, with_passages
from llm_engineering.evaluation.models import Models, labelled_answer
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.base_model import load_model, model_path
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import batches_by_length
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import SFTConfig
from tests.tiny_models import train

RESULTS = Path(__file__).parent / "results" / "generation.json"
RECIPE = Path(__file__).parent.parent / "configs" / "local.yaml"
QUESTIONS = 128
PLAIN_BATCH = 10
# Each side answers this often, and the faster time counts.
ROUNDS = 2
# Rows of the matrix products that are measured.
TOKENS = 2048

Answers = list[list[int]]


class Speed(NamedTuple):
    """What the machine can do: operations of matrix products, and bytes read from memory, per second."""

    flops: float
    bytes: float


def main() -> None:
    """Answer the questions on both sides and print the figures; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(description="Generated tokens per second, and ratios.")
    parser.add_argument("--cpu-time", action="store_true", help="measure the time of the processor, of one thread")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    # Load the models and the questions
    recipe = load_recipe(RECIPE, ["tracking.comet=off"])
    settings, model = Settings(), pin_revision(recipe.model)
    device = choose_device(recipe.compute)
    tokenizer = load_tokenizer(model, settings, recipe.formatting.chat_template)
    assert recipe.exam is not None
    exam = open_exam(recipe.exam, chunks(read_documents(recipe.documents)[0], recipe.documents))
    asked = [number for number, row in enumerate(exam.rows) if row.kind != "control"]
    asked = random.Random(recipe.seed).sample(asked, QUESTIONS)
    path = model_path(model, settings)
    plain, under = (
        AutoModelForCausalLM.from_pretrained(path, dtype=device.dtype, device_map=device.name) for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as scratch:
        setup = recipe.setup.model_copy(update={"model": model})
        own = settings.model_copy(update={"llm_output_dir": Path(scratch)})
        adapter = train(_rows(exam, tokenizer), _config(), setup, own).adapter
        adapted = PeftModel.from_pretrained(under, str(adapter)).eval()
        size = recipe.evaluation.batch_size
        base, trained = (
            Models(load_model(model, settings, device), folders, tokenizer, size)
            for folders in ({}, {"adapter": adapter})
        )

    # Answer them
    questions = [exam.rows[number].question for number in asked]
    passages = [with_passages(exam.rows[number].question, exam.retrieved[number]) for number in asked]
    longest, speed = recipe.exam.max_new_tokens, _speed(base.model, clock)
    found = {}
    for name, texts, theirs, ours, batch in (
        # As `take_exam`: four times as many questions without passages in a batch.
        ("base", questions, plain, base, 4 * size),
        ("adapter", questions, adapted, trained, 4 * size),
        ("passages", passages, plain, base, size),
    ):
        prompts = [prompt_ids([Message(role="user", content=text)], tokenizer) for text in texts]
        written, seconds = _timed(
            {
                "plain": partial(_plain, theirs, tokenizer, prompts, longest),
                "ours": partial(_ours, ours, prompts, longest, batch),
            },
            clock,
        )
        tokens = sum(map(len, written["ours"]))
        gaps = _gaps(theirs, prompts, written["plain"], written["ours"])
        limit = _least_seconds(ours.model, prompts, written["ours"], batch, speed)
        found[name] = {
            "ratio": seconds["plain"] / seconds["ours"],
            "share_of_limit": limit / seconds["ours"],
            "tokens_per_second": {side: tokens / spent for side, spent in seconds.items()},
            "seconds": seconds | {"limit": limit},
            "equal_answers": len(prompts) - len(gaps),
            "largest_gap_of_others": max(gaps, default=0.0),
            "prompt_tokens": sum(map(len, prompts)),
            "generated_tokens": tokens,
        }
    figures = {
        **found,
        "questions": QUESTIONS,
        "clock": "seconds of the processor" if arguments.cpu_time else "seconds",
        "threads": torch.get_num_threads(),
        "speed": speed._asdict(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    show(figures, RESULTS if arguments.write else None)


def _rows(exam: Exam, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The questions of the exam with their first accepted answers, as tokens."""
    rows = []
    for number, row in enumerate(exam.rows):
        if row.answers:
            prompt = prompt_ids([Message(role="user", content=row.question)], tokenizer)
            answer = [*tokenizer(row.answers[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            input_ids, labels = labelled_answer(prompt, answer)
            rows.append({"id": str(number), "input_ids": input_ids, "labels": labels})
    data = Dataset.from_list(rows)
    return DatasetDict(train=data, validation=data.select(range(4)))


def _config() -> SFTConfig:
    """Two epochs with the adapter of the default recipe."""
    return SFTConfig(
        learning_rate=1e-3, num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=1,
        eval_strategy="epoch", save_strategy="epoch", lora=LoraConfig(r=64, lora_alpha=64, target_modules="all-linear"),
    )  # fmt: skip


def _timed(
    sides: dict[str, Callable[[], Answers]], clock: Callable[[], float]
) -> tuple[dict[str, Answers], dict[str, float]]:
    """The answers of each side, and its fastest seconds. The sides take turns."""
    answers: dict[str, Answers] = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, answer in sides.items():
            started = clock()
            answers[side] = answer()
            seconds[side].append(clock() - started)
    return answers, {side: min(spent) for side, spent in seconds.items()}


@torch.inference_mode()
def _plain(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], longest: int) -> Answers:
    answers = []
    ends = end_token_ids(model, tokenizer)
    for start in range(0, len(prompts), PLAIN_BATCH):
        batch = tokenizer.pad(
            {"input_ids": list(prompts[start : start + PLAIN_BATCH])}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        written = model.generate(**batch, max_new_tokens=longest, do_sample=False, eos_token_id=ends)
        for row in written[:, batch["input_ids"].shape[1] :].tolist():
            ended = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:ended])
    return answers


def _ours(models: Models, prompts: Sequence[list[int]], longest: int, size: int) -> Answers:
    return [answer.ids for answer in models.complete(models.names[-1], prompts, longest, batch_size=size)]


@torch.inference_mode()
def _gaps(model: Any, prompts: Sequence[list[int]], one: Answers, other: Answers) -> list[float]:
    """For each two answers that differ: the distance of the logits of the first tokens that differ, in nats.

    In half precision, logits depend on the rows of a batch, by rounding. Then the two tokens are as good as equal.
    """
    gaps = []
    for prompt, a, b in zip(prompts, one, other, strict=True):
        if a != b:
            equal = next(place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            logits = model(torch.tensor([prompt + a[:equal]], device=model.device)).logits[0, -1].float()
            gaps.append(abs(float(logits[a[equal]] - logits[b[equal]])))
    return gaps


@torch.inference_mode()
def _speed(model: Any, clock: Callable[[], float]) -> Speed:
    """Measure the products of all matrices of the model with 2,048 rows, and a sum over 256 MB."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rows = {size: torch.randn(TOKENS, size).to(model.dtype).to(model.device) for m in matrices for size in m.shape[1:]}
    numbers = torch.ones(2**26, device=model.device)

    def fastest(work: Callable[[], Any]) -> float:
        spent = []
        for _ in range(5):
            started = clock()
            work()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            spent.append(clock() - started)
        return min(spent)

    def products() -> None:
        for matrix in matrices:
            rows[matrix.shape[1]] @ matrix.to(model.dtype).t()

    flops = 2 * TOKENS * sum(matrix.numel() for matrix in matrices)
    return Speed(flops / fastest(products), numbers.nbytes / fastest(numbers.sum))


def _least_seconds(model: Any, prompts: Sequence[list[int]], answers: Answers, size: int, speed: Speed) -> float:
    """The sum over all passes of the greater of the times for operations and for memory.

    A pass over the prompts computes the logits of their last tokens only, and each later pass one token of each answer that
    has not ended.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight.numel()
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    body = matrices - head
    heads = config.num_attention_heads
    width = config.num_hidden_layers * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    seconds = 0.0
    for batch in batches_by_length([len(prompt) for prompt in prompts], size):
        for step in range(max(len(answers[row]) for row in batch)):
            lengths = [len(prompts[row]) + step for row in batch if len(answers[row]) > step]
            tokens = sum(lengths) if step == 0 else len(lengths)
            # A token attends to half of its prompt on average, or to all tokens before it.
            attended = sum(n * n / 2 for n in lengths) if step == 0 else sum(lengths)
            flops = 2 * (body * tokens + head * len(lengths)) + 4 * width * heads * attended
            # In the pass over the prompts, keys and values are not read from memory.
            cached = 0 if step == 0 else 2 * width * config.num_key_value_heads * sum(lengths)
            memory = model.dtype.itemsize * (body + head + cached)
            seconds += max(flops / speed.flops, memory / speed.bytes)
    return seconds


if __name__ == "__main__":
    main()
