"""The evaluation report as a page: which model is better, how certain that is, and the answers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from markupsafe import Markup

from llm_engineering.evaluation.gate import PromotionDecision
from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.recipe.evaluation_blocks import INCUMBENT
from llm_engineering.recipe.stages import STAGES
from llm_engineering.reports.exam_report import exam_questions, exam_summary, model_answer, question
from llm_engineering.reports.page import (
    Verdict,
    cards,
    details,
    estimated,
    interval,
    interval_bars,
    marked,
    page,
    paragraph,
    table,
)
from llm_engineering.reports.reward_report import Parts, reward_parts
from llm_engineering.reports.training_report import training_charts

Report = Mapping[str, Any]
_BETTER = {"lower": "lower is better", "higher": "higher is better", None: "neither direction is better"}
_DIFFERENCES = {INCUMBENT: "What changed since the last promoted run"}
_NAMES = {"base": "the base model", INCUMBENT: "the model in production"}


def evaluation_page(
    data: Report,
    training: Report | None,
    facts: Mapping[str, str] | None = None,
    gate: PromotionDecision | None = None,
) -> str:
    """The whole page.

    Args:
        data: the report as JSON.
        training: the training report of the newest model, if there is one.
        facts: of the run, for the head of the page.
        gate: the decision of the gate; None if it has not judged the model.
    """
    parts = _parts(data) if STAGES[data["newest"]].policy else reward_parts(data)
    sections = [("Measures", parts.measures)]
    if training is not None:
        sections.append((f"Training of {training['stage']}", cards(training_charts(training["history"]))))
    sections += [_gate_section(gate), *parts.sections]
    lead = [*parts.lead, *([gate.reason] if gate is not None else [])]
    verdict = _gate_verdict(gate) if gate is not None else parts.found
    return page(parts.title, lead, sections, facts=facts, verdict=verdict, sample=parts.sample)


def _parts(data: Report) -> Parts:
    newest, exam = data["newest"], data["exam"]
    others = [name for name in data["models"] if name not in (newest, INCUMBENT)]
    compared = [*([INCUMBENT] if INCUMBENT in data["models"] else []), *others]
    sections = [(_DIFFERENCES.get(name, f"{newest} against {name}"), _differences(data, name)) for name in compared]
    if exam is not None:
        sections.append(("Exam", exam_summary(exam, data["measures"], newest, data.get("trained"))))
    rows = list((data.get("trained") or {}).items())
    sections.append(("Tokens trained on", table(["Stage", "Tokens, without those of general rows"], rows)))
    if data["judge"] is not None:
        sections.append(("Judge", _judge(data["judge"])))
    if data["checks"] is not None:
        sections.append(("Own checks", _checks(data["checks"], data["models"])))
    if data.get("canaries"):
        rows = [(canary["prefix"], ", ".join(canary["completed_by"]) or "no model") for canary in data["canaries"]]
        sections.append(("Canaries", table(["Words before the secret", "Completed by"], rows)))
    if data["lm_eval"] is not None:
        sections.append(("lm-eval", _lm_eval(data["lm_eval"])))
    if exam is not None:
        sections.append(("Exam: questions and answers", exam_questions(exam, data["newest"])))
    if data.get("rewards"):
        sections.append(("Rewards", _rewards(data)))
    if data["samples"]:
        sections.append(("Answers", _answers(data)))
    found, said = _result(data)
    return Parts("Evaluation report", [*_exam_lead(data), said], found, _measures(data), sections, _example(data))


def _gate_verdict(gate: PromotionDecision) -> Verdict:
    """The decision of the gate in a few words."""
    if gate.outcome == "passed":
        return Verdict(f"Gate passed{f': promoted to {gate.stage}' if gate.stage else ''}", "good")
    return (
        Verdict("Gate refused", "bad")
        if gate.outcome == "failed"
        else Verdict("Gate passed, but not promoted", "mixed")
    )


def _gate_section(gate: PromotionDecision | None) -> tuple[str, Markup]:
    """The rules of the gate with their numbers, as a section."""
    rules = gate.rules if gate is not None else []
    rows = [
        (
            rule.name,
            rule.reason or "" if rule.value is None else interval(rule.value, rule.low, rule.high, sign=True),
            rule.verdict if rule.verdict == "skipped" else marked(rule.verdict, rule.verdict == "passed"),
        )
        for rule in rules
    ]
    return "Rules of the gate", table(["Rule", "Measured gain", "Verdict"], rows)


def _result(data: Report) -> tuple[Verdict, str]:
    """How the newest model compares with the one in production, or else with the base model."""
    has_rows = data["heldout_rows"] > 0
    name = "heldout_loss" if has_rows else "document_loss" if data["heldout_documents"] else "reward"
    measure = data["measures"][name]
    newest, other = data["newest"], _other(data)
    difference = measure["differences"][f"{newest}-{other}"]
    word = verdict(difference, measure["better"])
    result = f"is {word} than" if word in ("better", "worse") else "does not differ significantly from"
    state: Literal["good", "bad", "mixed"] = "good" if word == "better" else "bad" if word == "worse" else "mixed"
    found = Verdict(f"The {newest.upper()} model {result} {_NAMES[other]}", state)
    held_out = (
        f"{counted(data['heldout_rows'], 'held-out row')}"
        if has_rows
        else f"{counted(data['heldout_documents'], 'held-out document')}"
    )
    shown = estimated(difference, sign=True)
    if name == "reward":
        return found, (
            f"On {counted(data['heldout_prompts'], 'held-out prompt')}, the reward of the {newest.upper()} model {result} "
            f"that of {_NAMES[other]}: {shown}."
        )
    return found, (
        f"On {held_out}, the loss of the {newest.upper()} model {result} that of {_NAMES[other]}: {shown} nats per token."
    )


def _other(data: Report) -> str:
    return INCUMBENT if INCUMBENT in data["models"] else "base"


def _exam_lead(data: Report) -> list[str]:
    """What the two models answer right of the exam's questions about one fact; empty without an exam."""
    measure, newest, other = data["measures"].get("exam_accuracy"), data["newest"], _other(data)
    if measure is None or other not in measure["models"]:
        return []
    right, number = measure["models"], measure["differences"][f"{newest}-{other}"]["n"]
    return [
        f"Of {number} exam questions about one fact, {_NAMES[other]} answers {right[other]['value']:.0%} right, and the "
        f"{newest.upper()} model {right[newest]['value']:.0%}."
    ]


def _example(data: Report) -> Markup | None:
    """The first drawn question of the exam, or else the first answers; None without any."""
    if data["exam"] is not None:
        return question(data["exam"], data["exam"]["rows"][data["exam"]["drawn"][0]])
    if data["samples"]:
        return _sample(data, data["samples"][0])
    return None


def _differences(data: Report, other: str) -> Markup:
    """A table of the newest model's measures minus those of another model."""
    rows = []
    for measure in data["measures"].values():
        difference = measure["differences"].get(f"{data['newest']}-{other}")
        if difference is not None:
            shown = estimated(difference, sign=True)
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
    body = paragraph(note, "small")
    for row in rewards["rows"]:
        answers = [
            (
                f"{name}: {answer['reward']:.2f} ("
                + ", ".join(f"{reward} {score:.2f}" for reward, score in answer["scores"].items())
                + ")",
                paragraph(answer["text"] or "(empty)"),
            )
            for name in data["models"]
            for answer in (row["answers"][name],)
        ]
        accepted = details("Accepted answers", paragraph(", ".join(row["accepted"]))) if row["accepted"] else ""
        body += details(row["prompt"], cards(answers, "stack") + accepted)
    return body


def _judge(judge: Report) -> Markup:
    rows = [
        (
            name,
            estimated(duel["win_rate"]),
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
    """Each prompt with its marks; the answers and what they fail are shown on demand."""
    passed = ", ".join(f"{name} {count} of {checks['prompts']}" for name, count in checks["passed"].items())
    body = paragraph(f"Passed: {passed}.")
    for row in checks["rows"]:
        answers = [
            (marked(name, not answer["failures"]), paragraph("; ".join(answer["failures"]) or "passed"))
            for name in models
            for answer in (row["answers"][name],)
        ]
        marks = Markup("").join(mark for mark, _ in answers)
        body += details(Markup("{} {}").format(row["prompt"], marks), cards(answers, "stack"))
    return body


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
    shown = [details(f"{number}. {one['prompt']}", _sample(data, one)) for number, one in enumerate(data["samples"], 1)]
    return paragraph(note, "small") + Markup("").join(shown)


def _sample(data: Report, sample: Report) -> Markup:
    answers = [(name, model_answer(sample["answers"][name])) for name in data["models"]]
    reference = details("Reference answer", paragraph(sample["reference"]))
    return paragraph(sample["prompt"], "question") + cards(answers, "stack") + reference
