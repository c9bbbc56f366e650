"""Measures how often the gate promotes a model that is not better, and how often it promotes a better one:

    python -m benchmarks.gate [--write]                        # simulation and small models, about ten minutes
    python -m benchmarks.gate --seeds 5 [--write]              # the recipe trained from five seeds, some minutes a seed
    python -m benchmarks.gate --arms [--write]                 # an untrained adapter of the recipe's model, minutes

A model of the same recipe with another seed is not better, so its promotion is a false one (an A/A test). The decisions are
those of `decide` with the rules of the recipe, on the measures that an evaluation computes. `--seeds` stores the answers of
each seed in `--folder`, so that an interrupted run continues, and more seeds can be added.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.gate_models import ARMS, answers_of_small_models, answers_of_untrained_adapter, small_exam
from benchmarks.machine import machine, show
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.gate import PromotionDecision, decide
from llm_engineering.evaluation.measures.exam import Exam, open_exam
from llm_engineering.evaluation.models import BASE, Sample
from llm_engineering.evaluation.statistics import Bootstrap, Rows, compare
from llm_engineering.progress import Progress
from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES, MEASURES, PromotionConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

RESULTS = Path(__file__).parent / "results"
# Answers of the base model, of the base model with retrieved passages, and of a trained model, by question. The trained
# model is of an earlier recipe for the handbook, without DPO.
RECORDED = RESULTS / "exam_answers.json"
GAINS = (0.05, 0.1, 0.2, 0.3)
NEWEST = "sft"

# The values of one model by measure, and the answers of one model by the id of the question.
Values = dict[str, Rows]
Answers = Mapping[str, str]


@dataclass(frozen=True)
class Gate:
    """The rules of a recipe, with the intervals that they are judged by."""

    rules: PromotionConfig
    bootstrap: Bootstrap

    @classmethod
    def of(cls, recipe: Recipe) -> Gate:
        """The gate of a recipe."""
        evaluation = recipe.evaluation
        return cls(recipe.promotion, Bootstrap(evaluation.bootstrap_samples, evaluation.confidence, recipe.seed))

    @property
    def measures(self) -> list[str]:
        """The measures of the exam that the rules of a run that ends with SFT name."""
        named = {rule.measure for rule in self.rules.all_rules() if rule.run == NEWEST}
        return [measure for measure in EXAM_MEASURES.values() if measure in named]

    def decide(self, values: Mapping[str, Values], measured: Mapping[str, Any] | None = None) -> PromotionDecision:
        """The decision on a model with the name `sft`.

        Args:
            values: the values of `base`, `sft` and perhaps `incumbent`.
            measured: measures of the model's own evaluation report, for rules about held-out rows.

        Raises:
            WorkError: a rule names a measure that was not measured.
        """
        found = {
            measure: compare(
                MEASURES[measure], {n: v[measure] for n, v in values.items() if measure in v}, NEWEST, self.bootstrap
            )
            for measure in self.measures
        }
        report = {
            "newest": NEWEST,
            "measures": {**(measured or {}), **found},
            "confidence": self.bootstrap.confidence,
        }
        decision = decide(report, self.rules, 1 if "incumbent" in values else None)
        for rule in decision.rules:
            if rule.verdict == "failed" and rule.value is None:
                raise WorkError(f"The rule {rule.name!r} cannot be judged: {rule.reason}.")
        return decision


def values_of(exam: Exam, answers: Answers) -> Values:
    """The values of one model: which of its answers are right."""
    indices = [index for index, row in enumerate(exam.rows) if row.id in answers]
    return exam.values({index: Sample(answers[exam.rows[index].id], True, []) for index in indices})


def rate(count: int, of: int) -> dict[str, Any]:
    """A count as a share, with the 95 % interval of Wilson."""
    low, high = stats.binomtest(count, of).proportion_ci(method="wilson")
    return {"promoted": count, "of": of, "share": round(count / of, 4), "interval": [round(low, 4), round(high, 4)]}


# Simulation on recorded answers


def simulate(gate: Gate, recorded: Mapping[str, Values], null_draws: int, gain_draws: int) -> dict[str, Any]:
    """Share of promotions if nothing is better, and with true gains in the share of right answers.

    Each draw has as many facts as the exam, drawn with replacement. The labels of the two models are swapped for each fact
    with probability 1/2, so that neither is better. A gain makes all questions about a fact right for the new model, for
    facts drawn with the probability that gives the expected gain.
    """
    first = recorded["sft"]
    # General questions are not asked with retrieval. There the two models have equal answers.
    second = {**first, **recorded["base+retrieval"]}
    right = (first["exam_accuracy"].value + second["exam_accuracy"].value) / 2
    figures: dict[str, Any] = {}
    for gain in (0.0, *GAINS):
        draws = gain_draws if gain else null_draws
        generator = np.random.default_rng(1)
        learned = gain / (1 - right)
        progress = Progress(f"simulated decisions, gain {gain:g}", draws)
        promoted = 0
        for _ in range(draws):
            drawn = {
                measure: _draw(
                    generator,
                    {BASE: recorded[BASE][measure], "incumbent": second[measure], NEWEST: first[measure]},
                    learned if measure == "exam_accuracy" else 0.0,
                )
                for measure in gate.measures
            }
            values = {name: {m: rows[name] for m, rows in drawn.items()} for name in (BASE, "incumbent", NEWEST)}
            promoted += gate.decide(values).passed
            progress.advance(1)
        figures[f"{gain:g}"] = rate(promoted, draws)
    return figures


def _draw(generator: np.random.Generator, rows: Mapping[str, Rows], learned: float) -> dict[str, Rows]:
    """Draw clusters with replacement, swap the labels of `sft` and `incumbent`, and let `sft` learn some clusters."""
    clusters = rows[NEWEST].clusters
    assert clusters is not None
    numbers, of_row = np.unique(clusters, return_inverse=True)
    drawn = generator.integers(0, len(numbers), len(numbers))
    indices = [np.flatnonzero(of_row == number) for number in drawn]
    sizes = [len(found) for found in indices]
    taken = {name: values.totals[np.concatenate(indices)] for name, values in rows.items()}
    swapped = np.repeat(generator.random(len(drawn)) < 0.5, sizes)
    learns = np.repeat(generator.random(len(drawn)) < learned, sizes)
    new, old = taken[NEWEST], taken["incumbent"]
    taken[NEWEST] = np.where(learns, 1.0, np.where(swapped, old, new))
    taken["incumbent"] = np.where(swapped, new, old)
    places = np.repeat(np.arange(len(drawn)), sizes)
    return {name: Rows.of(totals).in_clusters(places.tolist()) for name, totals in taken.items()}


def wrong_models(gate: Gate, exam: Exam, recorded: Mapping[str, Answers], draws: int) -> dict[str, Any]:
    """Share of promotions of models that would give the trained model's answers to other questions, and of an equal model.

    With `swapped_facts`, all questions about a fact get the answers about another fact, as if the facts of two entities had
    been swapped in the training data. With `shuffled_answers`, each question gets the answer to another one. General
    questions keep their answers. `untrained` answers as the base model does.
    """
    generator = np.random.default_rng(2)
    base = values_of(exam, recorded[BASE])
    asked = [index for index, row in enumerate(exam.rows) if row.kind != "control"]
    groups: dict[str, list[list[str]]] = {
        "shuffled_answers": [[exam.rows[index].id] for index in asked],
        "swapped_facts": [
            [exam.rows[index].id for index in asked if exam.clusters[index] == cluster]
            for cluster in dict.fromkeys(exam.clusters[index] for index in asked)
        ],
    }
    figures: dict[str, Any] = {}
    for arm, parts in groups.items():
        promoted, right = 0, []
        for _ in range(draws):
            # A rotation by at least one place in a random order, so that no group keeps its own answers.
            order = generator.permutation(len(parts))
            answers = dict(recorded["sft"])
            for target, source in zip(order, np.roll(order, 1), strict=True):
                given = itertools.cycle(recorded["sft"][question] for question in parts[source])
                answers |= dict(zip(parts[target], given, strict=False))
            values = values_of(exam, answers)
            promoted += gate.decide({BASE: base, NEWEST: values}).passed
            right.append(values["exam_accuracy"].value)
        figures[arm] = {**rate(promoted, draws), "exam_accuracy": round(float(np.mean(right)), 4)}
    untrained = gate.decide({BASE: base, NEWEST: base})
    figures["untrained"] = _rules(untrained)
    return figures


# Pairs of models from different seeds


def pairs(
    gate: Gate, models: Sequence[Values], base: Values, measured: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Decisions on every ordered pair of models: the first is new, the second is in production.

    Args:
        measured: the measures of each model's own evaluation report.
    """
    promoted, of, rule_passed = 0, 0, 0
    for new, old in itertools.permutations(range(len(models)), 2):
        decision = gate.decide(
            {BASE: base, NEWEST: models[new], "incumbent": models[old]}, measured[new] if measured else None
        )
        promoted += decision.passed
        rule_passed += all(rule.verdict == "passed" for rule in decision.rules if rule.than == "incumbent")
        of += 1
    return {
        "pairs": math.comb(len(models), 2),
        **rate(promoted, of),
        "better_than_incumbent": rule_passed,
        "exam_accuracy": [round(values["exam_accuracy"].value, 4) for values in models],
        "passed_without_incumbent": sum(
            gate.decide({BASE: base, NEWEST: values}, measured[number] if measured else None).passed
            for number, values in enumerate(models)
        ),
    }


def small_models(gate: Gate, seeds: int, folder: Path) -> dict[str, Any]:
    """Pairs of models of two layers that learn 40 facts, and the arms that must fail."""
    exam = small_exam()
    answers = {
        name: answers_of_small_models(name, range(1, seeds + 1 if name == "right" else 2), folder) for name in ARMS
    }
    base = values_of(exam, answers["untrained"][0])
    figures = pairs(gate, [values_of(exam, found) for found in answers["right"]], base)
    for name in ARMS[1:]:
        figures[name] = _rules(gate.decide({BASE: base, NEWEST: values_of(exam, answers[name][0])}))
    return figures


def untrained_adapter(gate: Gate, exam: Exam, recipe: Recipe) -> dict[str, Any]:
    """The decision on a fresh adapter of the recipe's model, which answers as the base model does."""
    answers = answers_of_untrained_adapter(recipe, exam)
    return _rules(gate.decide({name: values_of(exam, found) for name, found in answers.items()}))


def from_seeds(gate: Gate, exam: Exam, recipe: str, seeds: int, folder: Path) -> dict[str, Any]:
    """Train the recipe from the seeds that have no stored answers, and decide on every pair."""
    reports = []
    for seed in range(1, seeds + 1):
        file = folder / f"seed-{seed}.json"
        if not file.is_file():
            print(f"Training from seed {seed} of {seeds}", file=sys.stderr, flush=True)
            _train(recipe, seed, file)
        reports.append(json.loads(file.read_text(encoding="utf-8")))
    models = [values_of(exam, _answers(report, NEWEST)) for report in reports]
    base = values_of(exam, _answers(reports[0], BASE))
    return pairs(gate, models, base, [report["measures"] for report in reports])


def _train(recipe: str, seed: int, file: Path) -> None:
    """Train up to SFT from a seed, under a model name of its own without a model in production, and keep its report."""
    command = [sys.executable, "-m", "tools.cli", "run", NEWEST, "--config", recipe, "--json"]
    # No rule of the gate is about answers with retrieved passages.
    for override in (f"seed={seed}", f"name=gate-seed-{seed}", "exam.retrieval_passages=0"):
        command += ["--set", override]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    uri = json.loads(done.stdout.splitlines()[-1])["artifacts"]["evaluation_report"]["uri"]
    (report,) = Path(uri).rglob("report.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first, so that an interrupted run leaves no half file.
    partial = file.with_suffix(".partial")
    partial.write_text(report.read_text(encoding="utf-8"), encoding="utf-8")
    partial.rename(file)


def _answers(report: Mapping[str, Any], model: str) -> dict[str, str]:
    """The answers of a model by question, from an evaluation report."""
    return {row["id"]: row["answers"][model]["text"] for row in report["exam"]["rows"] if model in row["answers"]}


def _rules(decision: PromotionDecision) -> dict[str, Any]:
    keys = ("name", "value", "low", "high", "verdict")
    rules = [{key: getattr(rule, key) for key in keys} for rule in decision.rules if rule.verdict != "skipped"]
    return {"outcome": decision.outcome, "rules": rules}


def main() -> None:
    """Print the figures; `--write` also writes them to `benchmarks/results`."""
    parser = argparse.ArgumentParser(description="False promotions and power of the gate.")
    parser.add_argument("--config", default="configs/local.yaml")
    parser.add_argument("--folder", type=Path, default=Settings().llm_output_dir / "gate", help="for answers")
    parser.add_argument(
        "--small-seeds", type=int, default=12, help="models of two layers, each pair of which is compared"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--seeds", type=int, help="train the recipe from this many seeds, and compare every pair")
    chosen.add_argument("--arms", action="store_true", help="judge an untrained adapter of the recipe's model")
    parser.add_argument("--draws", type=int, default=4000, help="simulated decisions without a gain")
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results")
    arguments = parser.parse_args()
    # The recorded answers and the small models' exams have no likelihoods, so only the rules about the exam are measured.
    without = [] if arguments.seeds is not None else ["promotion.sft.better_than.base.heldout_loss=null"]
    recipe = load_recipe(arguments.config, without)
    assert recipe.exam is not None
    gate, exam = Gate.of(recipe), open_exam(recipe.exam, [])
    measured: dict[str, Callable[[], dict[str, Any]]] = {}
    name = "gate"
    if arguments.seeds is not None:
        name = "gate_seeds"
        measured["seeds"] = lambda: from_seeds(gate, exam, arguments.config, arguments.seeds, arguments.folder)
    if arguments.arms:
        name = "gate_arms"
        measured["untrained_adapter"] = lambda: untrained_adapter(gate, exam, recipe)
    if not measured:
        recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
        values = {model: values_of(exam, answers) for model, answers in recorded.items()}
        measured["simulation"] = lambda: simulate(gate, values, arguments.draws, arguments.draws // 8)
        measured["wrong_models"] = lambda: wrong_models(gate, exam, recorded, arguments.draws // 20)
        measured["small_models"] = lambda: small_models(gate, arguments.small_seeds, arguments.folder / "small")
    figures = {}
    for key, measure in measured.items():
        figures[key] = measure()
        print(json.dumps({key: figures[key]}), file=sys.stderr, flush=True)
    show({**figures, "machine": machine()}, RESULTS / f"{name}.json" if arguments.write else None)


if __name__ == "__main__":
    main()
