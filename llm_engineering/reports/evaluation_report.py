"""The evaluation report as a page: which model is better, how certain that is, and the answers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from llm_engineering.evaluation.incumbent import INCUMBENT
from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.reports.exam_report import exam_questions, exam_summary
from llm_engineering.reports.page import NARROW_INCHES, cards, interval, interval_bars, page, paragraph, table
from llm_engineering.reports.training_report import training_charts

Report = Mapping[str, Any]
_BETTER = {"lower": "lower is better", "higher": "higher is better", None: "neither direction is better"}
_NAMES = {"base": "the base model", INCUMBENT: "the model in production"}


def evaluation_page(data: Report, training: Report | None) -> str:
    """The whole page.

    Args:
        data: the report as JSON.
        training: the training report of the newest model, if there is one.
    """
    newest = data["newest"]
    changed = paragraph("No model was in production when this run began.")
    if INCUMBENT in data["models"]:
        changed = _differences(data, INCUMBENT)
    others = [name for name in data["models"] if name not in (newest, INCUMBENT)]
    sections = [("What changed since the last promoted run", changed)]
    sections += [(f"{newest} against {name}", _differences(data, name)) for name in others]
    exam = data["exam"]
    if exam is not None:
        sections.append(("Exam", exam_summary(exam, data["measures"], newest, data.get("trained"))))
    sections.append(("Measures", _measures(data)))
    if data.get("trained"):
        rows = list(data["trained"].items())
        sections.append(("Tokens trained on", table(["Stage", "Tokens, without those of general rows"], rows)))
    if training is not None:
        charts = training_charts(training["history"], NARROW_INCHES)
        sections.append((f"Training of {training['stage']}", cards(charts)))
    if data.get("rewards"):
        sections.append(("Rewards", _rewards(data)))
    if data["judge"] is not None:
        sections.append(("Judge", _judge(data["judge"])))
    if data["checks"] is not None:
        sections.append(("Own checks", _checks(data["checks"], data["models"])))
    if data["lm_eval"] is not None:
        sections.append(("lm-eval", _lm_eval(data["lm_eval"])))
    if exam is not None:
        sections.append(("Exam: questions and answers", exam_questions(exam)))
    if data["samples"]:
        sections.append(("Answers", _answers(data)))
    return page("Evaluation report", _lead(data), sections)


def _lead(data: Report) -> str:
    has_rows = data["heldout_rows"] > 0
    name = "heldout_loss" if has_rows else "document_loss" if data["heldout_documents"] else "reward"
    measure = data["measures"][name]
    newest, other = data["newest"], INCUMBENT if INCUMBENT in data["models"] else "base"
    difference = measure["differences"][f"{newest}-{other}"]
    word = verdict(difference, measure["better"])
    result = f"is {word} than" if word in ("better", "worse") else "does not differ significantly from"
    pairs = f" and {counted(data['heldout_pairs'], 'pair')}" if data["heldout_pairs"] else ""
    held_out = (
        f"{counted(data['heldout_rows'], 'held-out row')}{pairs}"
        if has_rows
        else f"{counted(data['heldout_documents'], 'held-out document')}"
    )
    shown = interval(difference["value"], difference["low"], difference["high"], sign=True)
    if name == "reward":
        return (
            f"On {counted(data['heldout_prompts'], 'held-out prompt')}, the reward of the {newest.upper()} model {result} "
            f"that of {_NAMES[other]}: {shown}."
        )
    return _exam_lead(data, newest, other) + (
        f"On {held_out}, the loss of the {newest.upper()} model {result} that of "
        f"{_NAMES[other]}: {shown} nats per token."
    )


def _exam_lead(data: Report, newest: str, other: str) -> str:
    """What the two models answer right of the exam's questions about one fact; empty without an exam."""
    measure = data["measures"].get("exam_accuracy")
    if measure is None or other not in measure["models"]:
        return ""
    right, number = measure["models"], measure["differences"][f"{newest}-{other}"]["n"]
    return (
        f"Of {number} exam questions about one fact, {_NAMES[other]} answers {right[other]['value']:.0%} right, and the "
        f"{newest.upper()} model {right[newest]['value']:.0%}. "
    )


def _differences(data: Report, other: str) -> Markup:
    """A table of the newest model's measures minus those of another model."""
    rows = []
    for measure in data["measures"].values():
        difference = measure["differences"].get(f"{data['newest']}-{other}")
        if difference is not None:
            shown = interval(difference["value"], difference["low"], difference["high"], sign=True)
            rows.append((measure["title"], shown, verdict(difference, measure["better"]), str(difference["n"])))
    return table(["Measure", f"{data['newest']} minus {other}", "Verdict", "Rows"], rows)


def _measures(data: Report) -> Markup:
    note = (
        f"Whiskers and brackets are {data['confidence']:.0%} intervals over documents, or over rows that name no document; "
        "those of the exam are over facts. Intervals of differences are paired: both models have the same rows."
    )
    if data["left_out"]:
        note += (
            f" {data['left_out']} further rows or pairs are left out, because the tokenizer of the model in production "
            "cannot render them."
        )
    charts = []
    for measure in data["measures"].values():
        bars = {name: (e["value"], e["low"], e["high"]) for name, e in measure["models"].items()}
        body = paragraph(_BETTER[measure["better"]], "small") + interval_bars(bars, measure["unit"])
        charts.append((measure["title"], body))
    return paragraph(note, "small") + cards(charts)


def _rewards(data: Report) -> Markup:
    rewards = data["rewards"]
    weights = ", ".join(f"{name} with the weight {weight:g}" for name, weight in rewards["weights"].items())
    note = f"The first of {counted(data['heldout_prompts'], 'held-out prompt')}. Their rewards: {weights}."
    rows = [
        (
            row["prompt"],
            ", ".join(row["accepted"]),
            name,
            row["answers"][name]["text"] or "(empty)",
            *(f"{score:.2f}" for score in row["answers"][name]["scores"].values()),
            f"{row['answers'][name]['reward']:.2f}",
        )
        for row in rewards["rows"]
        for name in data["models"]
    ]
    head = ["Prompt", "Accepted", "Model", "Answer", *rewards["weights"], "Weighted sum"]
    return paragraph(note, "small") + table(head, rows)


def _judge(judge: Report) -> Markup:
    rows = [
        (
            name,
            interval(duel["win_rate"]["value"], duel["win_rate"]["low"], duel["win_rate"]["high"]),
            *duel["verdicts"].values(),
            f"{duel['agreement']:.0%}",
        )
        for name, duel in judge["duels"].items()
    ]
    note = (
        f"{judge['model']} judges every row in both orders, at temperature 0, with prompt {judge['prompt_hash']}. A tie "
        "or an unparsable verdict counts as half a win. Agreement is the share of rows with the same verdict in both "
        "orders."
    )
    head = ["Models", "Win rate of the first", "Won", "Tie", "Unparsable", "Lost", "Agreement"]
    return paragraph(note, "small") + table(head, rows)


def _checks(checks: Report, models: list[str]) -> Markup:
    rows = [
        (row["prompt"], *("; ".join(row["answers"][name]["failures"]) or "passed" for name in models))
        for row in checks["rows"]
    ]
    passed = ", ".join(f"{name} {count} of {checks['prompts']}" for name, count in checks["passed"].items())
    return paragraph(f"Passed: {passed}.") + table(["Prompt", *models], rows)


def _lm_eval(results: Report) -> Markup:
    scores = results["scores"]
    models = list(scores)
    rows = [
        (task, metric, *(scores[name][task][metric] for name in models))
        for task, metrics in scores[models[0]].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    limit = f", the first {results['limit']} rows of each task" if results["limit"] else ""
    shots = "" if results["num_fewshot"] is None else f", {results['num_fewshot']} shots"
    template = "with" if results["apply_chat_template"] else "without"
    note = f"lm-eval {results['version']}{limit}{shots}, {template} the chat template."
    return paragraph(note, "small") + table(["Task", "Metric", *models], rows)


def _answers(data: Report) -> Markup:
    note = (
        f"The first {len(data['samples'])} of the {data['generated_rows']} held-out rows that were drawn with seed "
        f"{data['seed']}. Answers are generated greedily."
    )
    body = paragraph(note, "small")
    for number, sample in enumerate(data["samples"], 1):
        answers = [(name, _answer(sample["answers"][name])) for name in data["models"]]
        body += Markup("<p><strong>{}. {}</strong></p>{}").format(
            number, sample["prompt"], cards([("reference", paragraph(sample["reference"])), *answers], "answers")
        )
    return body


def _answer(answer: Report) -> Markup:
    end = "" if answer["stopped"] else "cut at evaluation.max_new_tokens"
    return paragraph(answer["text"] or "(empty)") + paragraph(end, "small")
