"""The figures of the knowledge benchmark: a row for each arm, and the gate's decisions on its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gate import NEWEST, Gate, Values, rate, values_of
from llm_engineering.evaluation.measures.exam import Exam, ExamRow
from llm_engineering.evaluation.models import BASE
from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES

RECIPE, SWAPPED = "recipe", "swapped"
# The arms whose models the gate must refuse, and the recipe, which it should promote.
JUDGED = (RECIPE, "passages", SWAPPED)


class Key(NamedTuple):
    """An arm as it is measured: `tokens` is None without training."""

    arm: str
    tokens: int | None


def arms_table(
    gate: Gate, exams: Sequence[Exam], found: Mapping[Key, Sequence[Mapping[str, str]]]
) -> list[dict[str, Any]]:
    """A row for each arm: its measures, and the paired differences to the base model and to the recipe."""
    exam, bootstrap = pooled(exams), gate.bootstrap
    values = {
        key: values_of(exam, {f"{n} {id_}": text for n, one in enumerate(answers) for id_, text in one.items()})
        for key, answers in found.items()
    }
    rows = []
    for key, own in values.items():
        row: dict[str, Any] = {**key._asdict(), "measures": {}, "minus_base": {}, "recipe_minus": {}}
        recipe = values.get(Key(RECIPE, key.tokens), {}) if key.arm != RECIPE else {}
        for name, measured in own.items():
            row["measures"][name] = bootstrap.estimate(measured)._asdict()
            if key.arm != BASE:
                row["minus_base"][name] = bootstrap.difference(measured, values[Key(BASE, None)][name])._asdict()
            if name in recipe:
                row["recipe_minus"][name] = bootstrap.difference(recipe[name], measured)._asdict()
        row["accuracy_by_seed"] = [
            round(values_of(one, answers)[EXAM_MEASURES["single"]].value, 4)
            for one, answers in zip(exams, found[key], strict=True)
        ]
        rows.append(row)
    return rows


def pooled(exams: Sequence[Exam]) -> Exam:
    """The exams of all seeds as one. Ids and facts get the number of their seed.

    The same general question is asked after each seed, so its answers are one cluster.
    """
    rows: list[ExamRow] = []
    for number, exam in enumerate(exams):
        for row in exam.rows:
            facts = [row.id] if row.kind == "control" else [f"{number} {fact}" for fact in row.facts]
            rows.append(row.model_copy(update={"id": f"{number} {row.id}", "facts": facts}))
    return Exam(rows, [[] for _ in rows], exams[0].max_new_tokens)


def decisions(
    gate: Gate, exams: Sequence[Exam], found: Mapping[Key, Sequence[Mapping[str, str]]]
) -> list[dict[str, Any]]:
    """The gate's decisions on each model of some arms, by its rules for a run that ends with sft."""
    decisions = []
    for key, answers in found.items():
        if key.arm not in JUDGED:
            continue
        outcomes = []
        for exam, base, own in zip(exams, found[Key(BASE, None)], answers, strict=True):
            values: dict[str, Values] = {BASE: values_of(exam, base), NEWEST: values_of(exam, own)}
            outcomes.append(gate.decide(values))
        failed = [[rule.name for rule in decision.rules if rule.verdict == "failed"] for decision in outcomes]
        promoted = sum(decision.passed for decision in outcomes)
        decisions.append({**key._asdict(), **rate(promoted, len(outcomes)), "failed_rules": failed})
    return decisions
