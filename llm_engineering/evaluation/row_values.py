"""The newest model's value on every held-out row, as the report stores it, and paired differences between two reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llm_engineering.evaluation.heldout import HeldOutRow
from llm_engineering.evaluation.measures.exam import Exam, ExamRow
from llm_engineering.evaluation.measures.observation import Observation, Work
from llm_engineering.evaluation.statistics import TRANSFORMS, Bootstrap, Estimate, Rows, possible
from llm_engineering.recipe.evaluation_blocks import (
    DOCUMENT_MEASURES,
    EXAM_MEASURES,
    MEASURES,
    PAIR_MEASURES,
    REWARD,
    is_reward,
)

# 10,000 rows with ten measures take about a megabyte of JSON. Of more rows nothing is stored.
MAX_ROWS = 10_000
# Digits of a stored value. Intervals show two.
_DIGITS = 6
# The perplexity is a function of the loss, so its rows are not stored a second time.
_STORED_AS = {"perplexity": "heldout_loss"}
_OF_QUESTIONS = ("heldout_loss", "question_gain")
_OF_ANSWERS = ("rouge_l", "stopped", "repetition", "length_ratio", "empty")

Report = Mapping[str, Any]

# Why a measure of two reports has no paired difference.
OTHER_ROWS = "not comparable: the held-out rows differ"
OTHER_REWARDS = "not comparable: the rewards have other weights"
OTHER_TOKENS = "not comparable: the rows have other numbers of tokens"
UNKNOWN_ROWS = "no per-row values"
ONE_SIDE = "measured for one version only"


def row_values(found: Observation, work: Work) -> dict[str, Any]:
    """The report's `row_values`: the ids and clusters of each kind of rows, and a model's values on them by measure."""
    ours = work.ours
    ids = {
        "questions": _ids(ours.rows),
        "pairs": _ids(ours.pairs),
        "documents": _ids(ours.texts),
        "answers": _ids([ours.rows[index] for index in work.indices]),
        "prompts": _numbered([row.id for row, _ in work.prompts]),
        "checks": _numbered([str(check.messages) for check in work.checks]),
        "canaries": _numbered([canary.prefix for canary in work.canaries]),
    }
    stored: dict[str, Any] = {"ids": {}, "measures": {}}
    for measure, rows in found.rows.items():
        kind = _kind(measure)
        if kind is None or measure in _STORED_AS or len(rows.totals) > MAX_ROWS:
            continue
        stored["ids"][kind] = ids[kind]
        values: dict[str, Any] = {"of": kind, "totals": _rounded(rows.totals)}
        if (rows.weights != 1).any():
            values["weights"] = _rounded(rows.weights)
        if rows.clusters is not None:
            values["clusters"] = rows.clusters.tolist()
        stored["measures"][measure] = values
    return stored


def paired(first: Report, second: Report) -> dict[str, dict[str, Any]]:
    """Every measure of the newest models of two evaluation reports, by its name.

    Each has `title`, `unit`, `better`, the estimates `first` and `second` (None if a report lacks the measure),
    `difference`, the second minus the first, and `reason`. Without the same rows on both sides `difference` is None, and
    `reason` says why.
    """
    # With the settings of the later report, as every interval of it.
    bootstrap = Bootstrap(second["bootstrap_samples"], second["confidence"], second["seed"])
    return {
        measure: _pair(measure, first, second, bootstrap) for measure in {**first["measures"], **second["measures"]}
    }


def _pair(measure: str, first: Report, second: Report, bootstrap: Bootstrap) -> dict[str, Any]:
    reports = (first, second)
    known = [report["measures"].get(measure) for report in reports]
    entry = known[1] or known[0]
    found: dict[str, Any] = {name: entry[name] for name in ("title", "unit", "better")} | {
        name: one["models"].get(report["newest"]) if one is not None else None
        for name, one, report in zip(("first", "second"), known, reports, strict=True)
    }
    rows = [_stored(measure, report) for report in reports]
    difference: Estimate | None = None
    if None in (found["first"], found["second"]):
        reason = ONE_SIDE
    elif rows[0] is None or rows[1] is None:
        reason = UNKNOWN_ROWS
    elif rows[0].keys() != rows[1].keys():
        reason = OTHER_ROWS
    else:
        values = _aligned(rows[0], rows[1])
        reason = "" if (values[0].weights == values[1].weights).all() else OTHER_TOKENS
        if measure == REWARD and first["rewards"]["weights"] != second["rewards"]["weights"]:
            reason = OTHER_REWARDS
        if not reason:
            span = MEASURES[measure].span if measure in MEASURES else math.inf
            difference = possible(bootstrap.difference(values[1], values[0], TRANSFORMS.get(measure)), -span, span)
    return found | {"difference": difference._asdict() if difference is not None else None, "reason": reason}


# A row's total, weight and cluster by the id of the row.
_ById = dict[str, tuple[float, float, int]]


def _stored(measure: str, report: Report) -> _ById | None:
    """The rows of a measure; None if the report does not have them."""
    if measure in EXAM_MEASURES.values():
        return _exam_rows(measure, report)
    # Reports from before rows were stored have no `row_values`.
    stored = report.get("row_values") or {"measures": {}}
    values = stored["measures"].get(_STORED_AS.get(measure, measure))
    if values is None:
        return None
    ids = stored["ids"][values["of"]]
    weights = values.get("weights") or [1.0] * len(ids)
    clusters = values.get("clusters") or range(len(ids))
    return dict(zip(ids, zip(values["totals"], weights, clusters, strict=True), strict=True))


def _exam_rows(measure: str, report: Report) -> _ById | None:
    """Whether each question of an exam was answered right. Questions are the same if all of their keys are."""
    if report["exam"] is None:
        return None
    # In the report, `answers` are those of the models.
    rows = [
        ExamRow.model_validate({**{key: row[key] for key in ExamRow.model_fields}, "answers": row["accepted"]})
        for row in report["exam"]["rows"]
    ]
    clusters = Exam(rows, [], 0).clusters
    return {
        row.model_dump_json(): (float(asked["answers"][report["newest"]]["right"]), 1.0, cluster)
        for row, asked, cluster in zip(rows, report["exam"]["rows"], clusters, strict=True)
        if row.measure == measure and report["newest"] in asked["answers"]
    }


def _aligned(first: _ById, second: _ById) -> list[Rows]:
    """Both versions' values in the order of the second, with its clusters."""
    clusters = [cluster for _, _, cluster in second.values()]
    return [
        Rows.of([side[name][0] for name in second], [side[name][1] for name in second]).in_clusters(clusters)
        for side in (first, second)
    ]


def _kind(measure: str) -> str | None:
    """The kind of rows of a measure; None for measures whose rows have no ids, as those of lm-eval."""
    kinds = {
        "questions": (*_OF_QUESTIONS, *_STORED_AS),
        "answers": _OF_ANSWERS,
        "pairs": PAIR_MEASURES,
        "documents": DOCUMENT_MEASURES,
        "prompts": (REWARD,),
        "checks": ("checks",),
        "canaries": ("canaries",),
    }
    return "prompts" if is_reward(measure) else next((kind for kind, names in kinds.items() if measure in names), None)


def _ids(rows: Sequence[HeldOutRow[Any]]) -> list[str]:
    return _numbered([row.row.id for row in rows])


def _numbered(ids: Sequence[str]) -> list[str]:
    """The ids, with a number for each further row of one id: a conversation may have a row for each of its answers."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in ids:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return numbered


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
