"""Evaluates base, SFT and DPO model on the same held-out rows and writes the evaluation report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from llm_engineering.compute.device import choose_device
from llm_engineering.config import EvaluationConfig, TrainingSetup
from llm_engineering.data.rows import InstructionRow
from llm_engineering.evaluation.measures import (
    Models,
    heldout_loss,
    labelled_answers,
    labelled_rows,
    preference_accuracy,
    preference_margin,
)
from llm_engineering.models import load_model, load_tokenizer
from llm_engineering.reports import page, table, write_report
from llm_engineering.settings import Settings

_NAMES = {
    "heldout_loss": "Held-out loss, nats a token",
    "preference_accuracy": "Preference accuracy",
    "preference_margin": "Preference margin, nats a token",
}


def evaluate(
    folder: Path,
    adapters: Mapping[str, Path],
    sft_test: Dataset,
    dpo_test: Dataset | None,
    rows: Sequence[InstructionRow],
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
) -> dict[str, Any]:
    """Measure the base model and each adapter, write `report.json` and `report.html`, and return the JSON report.

    Args:
        adapters: folders by name, `sft` and perhaps `dpo`.
        sft_test: held-out `input_ids` and `labels`.
        dpo_test: held-out `prompt_ids`, `chosen_ids` and `rejected_ids`; None leaves preference measures out.
        rows: held-out instruction rows; the first ones are answered by every model.
    """
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    base = load_model(setup.model, settings, choose_device(setup.compute))
    models = Models(base, adapters, tokenizer, config.batch_size)
    metrics: dict[str, float] = {}
    for name in models.names:
        metrics[f"heldout_loss_{name}"] = heldout_loss(models.scores(name, labelled_rows(sft_test), "held-out loss"))
        if dpo_test is not None:
            chosen, rejected = (
                models.scores(name, labelled_answers(dpo_test, answer), f"{answer} answers")
                for answer in ("chosen", "rejected")
            )
            metrics[f"preference_accuracy_{name}"] = preference_accuracy(chosen, rejected)
            metrics[f"preference_margin_{name}"] = preference_margin(chosen, rejected)
    samples = []
    for row in rows[: config.sample_answers]:
        answers = {name: models.answer(name, row.prompt, config.max_new_tokens) for name in models.names}
        samples.append(
            {
                "prompt": row.prompt[-1].content,
                "reference": row.completion[0].content,
                "answers": {name: sample._asdict() for name, sample in answers.items()},
            }
        )
    data = {
        "models": models.names,
        "metrics": metrics,
        "samples": samples,
        "heldout_rows": len(sft_test),
        "heldout_pairs": len(dpo_test) if dpo_test is not None else 0,
    }
    write_report(folder, data, _page(data))
    return data


def _page(data: Mapping[str, Any]) -> str:
    models, metrics = data["models"], data["metrics"]
    measures = [
        (title, *(metrics[f"{key}_{name}"] for name in models))
        for key, title in _NAMES.items()
        if f"{key}_{models[0]}" in metrics
    ]
    samples = [
        (
            sample["prompt"],
            sample["reference"],
            *(
                sample["answers"][name]["text"] + ("" if sample["answers"][name]["stopped"] else " … [not ended]")
                for name in models
            ),
        )
        for sample in data["samples"]
    ]
    lead = (
        f"On {data['heldout_rows']} held-out rows"
        + (f" and {data['heldout_pairs']} held-out pairs" if data["heldout_pairs"] else "")
        + ", prompted as in training"
    )
    return page(
        "Evaluation report",
        lead,
        [
            ("Measures", table(["Measure", *models], measures)),
            ("Answers", table(["Prompt", "Reference", *models], samples)),
        ],
    )
