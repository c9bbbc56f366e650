"""The page that compares two versions of a model: measures, curves, recipes, data and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from markupsafe import Markup

from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.reports.exam_report import RIGHT, WRONG
from llm_engineering.reports.page import Verdict, cards, estimated, line_chart, page, paragraph, table

Report = Mapping[str, Any]
# Answers that the page shows.
ANSWERS = 20


def comparison_page(data: Report) -> str:
    """The whole page, from the object that `models compare --json` prints."""
    names, charts = data["names"], _curves(data)
    nothing = paragraph("Nothing differs.")
    sections = [
        ("Curves", cards(charts) if charts else Markup("")),
        ("Measures", _measures(data)),
        ("Recipes", table(["Key", *names], data["recipes"]) if data["recipes"] else nothing),
        ("Data", table(["What", *names], data["data"]) if data["data"] else nothing),
        ("Answers side by side", _answers(data) if data["answers"] else Markup("")),
    ]
    title = f"{data['model']}: {names[0]} and {names[1]}"
    words = [verdict(m["difference"], m["better"]) for m in data["measures"].values() if m["difference"] is not None]
    better, worse = words.count("better"), words.count("worse")
    shown = Verdict(
        f"{names[1].capitalize()}: {better} better, {worse} worse" if words else "Not comparable",
        "good" if better and not worse else "bad" if worse and not better else "mixed",
    )
    facts = {"Model": data["model"], "Compared": " and ".join(names)} | data["facts"]
    return page(title, sentences(data), sections, facts=facts, verdict=shown)


def sentences(data: Report) -> list[str]:
    """What the measures show, and how much differs."""
    first, second = data["names"]
    measures = data["measures"].values()
    words = [verdict(m["difference"], m["better"]) for m in measures if m["difference"] is not None]
    found = [
        f"On the same rows, {second} is better than {first} in {counted(words.count('better'), 'measure')} and worse in "
        f"{words.count('worse')}. The difference is not significant in {sum(word not in ('better', 'worse') for word in words)}."
        if words
        else f"No measure of {first} and {second} can be compared."
    ]
    left = sum(m["difference"] is None for m in measures)
    if words and left:
        found.append(f"{counted(left, 'measure')} cannot be compared; the table says why.")
    found.append(
        f"{counted(len(data['recipes']), 'key')} of the recipes and {counted(len(data['data']), 'fact')} of the data differ."
    )
    return found


def measure_rows(data: Report) -> list[tuple[str, str, str, str, str]]:
    """Title, both values, the difference with its interval, and the verdict, or why there is none."""
    rows = []
    for measure in data["measures"].values():
        values = [
            estimated(one) if one is not None else "not measured" for one in (measure["first"], measure["second"])
        ]
        difference = measure["difference"]
        shown, word = "", measure["reason"]
        if difference is not None:
            shown = estimated(difference, sign=True)
            word = verdict(difference, measure["better"])
        rows.append((measure["title"], values[0], values[1], shown, word))
    return rows


def compared_answers(first: Report, second: Report) -> list[dict[str, Any]]:
    """Answers of both newest models to the same questions: of the exam, then of the held-out rows, at most `ANSWERS`.

    Exam questions that only one of them answers right come first.
    """
    asked = [_asked(first), _asked(second)]
    both: list[dict[str, Any]] = [
        {"question": question, "reference": reference, "first": answer, "second": asked[1][question, reference]}
        for (question, reference), answer in asked[0].items()
        if (question, reference) in asked[1]
    ]
    changed = [pair["first"].get("right") != pair["second"].get("right") for pair in both]
    ordered = chain(
        (pair for pair, differs in zip(both, changed, strict=True) if differs),
        (pair for pair, differs in zip(both, changed, strict=True) if not differs),
    )
    return list(islice(ordered, ANSWERS))


def _asked(report: Report) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest model's answers by question and reference."""
    newest = report["newest"]
    rows: Iterator[tuple[str, str, Report]] = chain(
        (
            (row["question"], " / ".join(row["accepted"]), row["answers"])
            for row in (report["exam"] or {"rows": []})["rows"]
        ),
        ((sample["prompt"], sample["reference"], sample["answers"]) for sample in report["samples"]),
    )
    return {
        (question, reference): {key: answers[newest][key] for key in ("text", "right") if key in answers[newest]}
        for question, reference, answers in rows
        if newest in answers
    }


def _measures(data: Report) -> Markup:
    first, second = data["names"]
    head = ["Measure", first, second, f"{second} minus {first}", "Verdict"]
    note = (
        "Values are those of each version's own evaluation. Differences are paired: both models have the same held-out rows, and "
        "the interval is over documents or facts. Where the rows differ, the values must not be compared."
    )
    return paragraph(note, "small") + table(head, measure_rows(data))


def _curves(data: Report) -> list[tuple[str, Markup]]:
    """The losses of each stage, one version over the other."""
    charts = []
    for stage, histories in data["training"].items():
        for key, kind in (("eval_loss", "Validation loss"), ("loss", "Training loss")):
            curves = {
                name: [(entry["step"], entry[key]) for entry in history or () if key in entry]
                for name, history in zip(data["names"], histories, strict=True)
            }
            if trained := [name for name, points in curves.items() if points]:
                # A chart with one line has no legend.
                whose = f", {trained[0]}" if len(trained) == 1 else ""
                charts.append((f"{kind} of {stage}{whose}", line_chart(curves, "step", "loss")))
    return charts


def _answers(data: Report) -> Markup:
    body = paragraph("Exam questions that only one version answers right come first.", "small")
    for number, pair in enumerate(data["answers"], 1):
        answers: Sequence[tuple[str, Markup]] = [
            (f"{name}{_mark(pair[side])}", paragraph(pair[side]["text"] or "(empty)"))
            for name, side in zip(data["names"], ("first", "second"), strict=True)
        ]
        body += Markup("<p><strong>{}. {}</strong></p>{}").format(
            number,
            pair["question"],
            cards([("reference", paragraph(pair["reference"] or "(none)")), *answers]),
        )
    return body


def _mark(answer: Report) -> str:
    return f": {RIGHT if answer['right'] else WRONG}" if "right" in answer else ""
