"""Compares a version with its replay: weights, losses, measures and rows; and where both were trained."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from safetensors import safe_open

from llm_engineering.data.storage import stream_records
from llm_engineering.progress import counted
from llm_engineering.recipe.evaluation_blocks import INCUMBENT

# Files or steps that a difference names.
_NAMED = 4


class ReplayDifference(NamedTuple):
    """Something of a version that was compared with its replay. `difference` is empty if both are equal."""

    what: str
    difference: str


def compare_weights(stage: str, then: Path, now: Path) -> ReplayDifference:
    """Compare the folders of a trained model, file by file, and the tensors of the weights that differ."""
    names = sorted({str(file.relative_to(side)) for side in (then, now) for file in side.rglob("*") if file.is_file()})
    differing = [name for name in names if _digest(then / name) != _digest(now / name)]
    said = _share(differing, names, "file")
    weights = [name for name in differing if name.endswith(".safetensors")]
    if differing and all((side / name).is_file() for side in (then, now) for name in weights):
        gaps = dict(gap for name in weights for gap in _gaps(then / name, now / name))
        changed = [name for name, gap in gaps.items() if gap != 0]
        if changed:
            said += f"; {len(changed)} of {counted(len(gaps), 'tensor')} differ, by at most {max(gaps.values()):.3g}"
        elif weights:
            said += "; all tensors are equal"
    return ReplayDifference(f"weights of {stage}", said)


def _gaps(then: Path, now: Path) -> Iterator[tuple[str, float]]:
    """The largest difference of each tensor of two files; infinite if a tensor is missing, or has another shape."""
    with safe_open(then, "pt") as one, safe_open(now, "pt") as other:
        names = set(one.keys()), set(other.keys())
        for name in sorted(names[0] | names[1]):
            if name in names[0] & names[1]:
                a, b = one.get_tensor(name), other.get_tensor(name)
                if a.shape == b.shape:
                    yield name, float((a.double() - b.double()).abs().max()) if not torch.equal(a, b) else 0.0
                    continue
            yield name, float("inf")


def compare_losses(stage: str, then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> ReplayDifference:
    """Compare the losses of two histories, step by step."""
    sides = [
        {(e["step"], name): e[name] for e in side for name in ("loss", "eval_loss") if name in e}
        for side in (then, now)
    ]
    keys = sorted(sides[0].keys() | sides[1].keys())
    differing = [key for key in keys if sides[0].get(key) != sides[1].get(key)]
    said = _share([f"{name} of step {step}" for step, name in differing], keys, "loss", "losses")
    gaps = [abs(sides[0][key] - sides[1][key]) for key in differing if key in sides[0] and key in sides[1]]
    if gaps:
        said += f"; by at most {max(gaps):.3g}"
    return ReplayDifference(f"losses of {stage}", said)


def compare_measures(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[ReplayDifference]:
    """Compare each measure of two evaluation reports. The model in production is left out: a replay has none."""
    found = []
    for name in dict.fromkeys([*then["measures"], *now["measures"]]):
        models = [report["measures"].get(name, {"models": {}})["models"] for report in (then, now)]
        differing = [
            f"{model} {_value(models[0].get(model))} → {_value(models[1].get(model))}"
            for model in dict.fromkeys([*models[0], *models[1]])
            if model != INCUMBENT and models[0].get(model) != models[1].get(model)
        ]
        found.append(ReplayDifference(f"measure {name}", ", ".join(differing)))
    return found


def compare_rows(name: str, then: DatasetDict, now: DatasetDict) -> ReplayDifference:
    """Compare the rows of each table of two datasets by their hashes, in any order."""
    differing = []
    for table in dict.fromkeys([*then, *now]):
        rows = [_hashes(side[table]) if table in side else Counter() for side in (then, now)]
        lost, added = (rows[0] - rows[1]).total(), (rows[1] - rows[0]).total()
        if lost or added:
            differing.append(f"{table}: {lost} of {counted(rows[0].total(), 'row')} are gone, {added} are new")
    return ReplayDifference(name, "; ".join(differing) or "the same rows in another order, or in other files")


def differing_environment(then: Mapping[str, Any], now: Mapping[str, Any], libraries: Sequence[str]) -> list[str]:
    """What differs of two environments of training: the machine, and the versions of these libraries."""
    facts = [
        {
            **{k: v for k, v in side.items() if k != "packages"},
            **{name: side["packages"].get(name) for name in libraries},
        }
        for side in (then, now)
    ]
    return [
        f"{name} {facts[0].get(name) or 'none'} → {facts[1].get(name) or 'none'}"
        for name in dict.fromkeys([*facts[0], *facts[1]])
        if facts[0].get(name) != facts[1].get(name)
    ]


def _share(differing: Sequence[str], among: Sequence[Any], noun: str, plural: str | None = None) -> str:
    if not differing:
        return ""
    named = ", ".join(differing[:_NAMED]) + (", …" if len(differing) > _NAMED else "")
    return f"{len(differing)} of {len(among)} {plural or noun + 's'} differ ({named})"


def _value(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "none"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.6g}, {estimate['high']:.6g}]"
    return f"{estimate['value']:.6g}{interval}"


def _hashes(table: Any) -> Counter[bytes]:
    rows = (json.dumps(row, sort_keys=True, default=str).encode() for row in stream_records(table))
    return Counter(hashlib.blake2b(row, digest_size=12).digest() for row in rows)


def _digest(file: Path) -> bytes:
    if not file.is_file():
        return b""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
