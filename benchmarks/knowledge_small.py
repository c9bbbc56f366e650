"""A random model of two layers, and a writer of questions, to try the benchmark of knowledge in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_engineering.generation.types import Answer, Messages, Sampling
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from tests.tiny_models import write_model

_RECIPE = "configs/local.yaml"


class TemplateWriter:
    """Writes a question from words of its request, as a model would that finds no better one."""

    identity = "template"
    writes_json = False
    temperature: float | None = 0.0

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, what: str, banned: Sequence[Sequence[str]] = ()
    ) -> list[Answer]:
        """End each question with the name that it is about."""
        topics = [prompt.rpartition("Question about ")[2].rpartition(": ")[0] for prompt in prompts]
        return [Answer(f"is it at {topic}?") for topic in topics]

    def answer(self, requests: Sequence[Messages], sampling: Sampling, what: str) -> list[Answer]:
        """Ask what the text says, with the words that it begins with."""
        texts = [request[-1]["content"] for request in requests]
        return [Answer(f"What is known of {' '.join(_passage(text).split()[:6]).strip('.,')}?") for text in texts]


def _passage(request: str) -> str:
    """The longest line of a request, which is its passage."""
    return max(request.splitlines(), key=len)


def small_recipe(folder: Path) -> Recipe:
    """The recipe of the handbook for a random model, which is written to `folder/model` if it is not there."""
    if not (folder / "model" / "config.json").is_file():
        write_model(folder / "model", "qwen3")
    keys = {
        "model.name_or_path": folder / "model",
        "model.revision": "small",
        "compute.device": "cpu",
        "compute.dtype": "float32",
        "tracking.comet": "off",
        "evaluation.batch_size": 32,
        "exam.max_new_tokens": 4,
        # As in `open_bench`
        "promotion.sft.better_than.base.heldout_loss": "null",
        "cpt.lora.r": 4,
        "cpt.lora.lora_alpha": 4,
    }
    return load_recipe(_RECIPE, [f"{key}={value}" for key, value in keys.items()])
