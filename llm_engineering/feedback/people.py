"""Makes rows of what people said, for the sources that a recipe names beside files: `review` and `feedback`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from llm_engineering.errors import RequestError
from llm_engineering.feedback import comparisons, decisions, served
from llm_engineering.feedback.human_rows import Said
from llm_engineering.recipe.data_blocks import FEEDBACK, REVIEW, rows_key
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings


class Source(NamedTuple):
    """A source of rows of people.

    Attributes:
        folder: the folder in LLM_OUTPUT_DIR that has a folder for each recipe's name.
        remedy: how people add to it.
    """

    folder: str
    remedy: str


def _decided(folder: Path, kind: str) -> Said:
    """The decisions of reviewers on rows of a kind that change them."""
    found = decisions.current(decisions.stored(folder)).values()
    return Said([], [one for one in found if one.kind == kind and one.action in ("edit", "drop")], [])


SOURCES = {
    REVIEW: Source("review", "run `make review`"),
    FEEDBACK: Source(
        "served",
        'log requests with `make serve ARGS="--set serving.log_requests=true"` and send feedback on the answers',
    ),
}


def _read(source: str, kind: str, recipe: Recipe, settings: Settings) -> list[Said]:
    """What a source gives for the rows of a kind."""
    folder = folder_of(source, recipe.name, settings)
    if source == FEEDBACK:
        return [served.said(folder, kind)]
    return [comparisons.said(folder, kind, recipe.generation.rejected_cut), _decided(folder, kind)]


def folder_of(source: str, name: str, settings: Settings) -> Path:
    """The folder with what people said about the models and rows of a recipe; `name` is that of the recipe."""
    return settings.llm_output_dir / SOURCES[source].folder / name


def snapshots(settings: Settings) -> Path:
    """The folder with what people had said when a run began."""
    return settings.llm_output_dir / "said"


def said_about(recipe: Recipe, kind: str, settings: Settings) -> Said | None:
    """What people said about the rows of a kind, by the sources that the recipe names; None if it names none.

    Raises:
        RequestError: no row can be made of a source, because nobody has said anything yet.
    """
    rows, made, aside = [], [], []
    for name in recipe.data.people(kind):
        found = _read(name, kind, recipe, settings)
        if not any(said.rows or said.decisions for said in found):
            counts = Counter(row.reason for said in found for row in said.aside)
            set_aside = f" (set aside: {', '.join(f'{n} {reason}' for reason, n in counts.items())})" if counts else ""
            raise RequestError(
                f"data.{rows_key(kind)} names {name}, and nobody has said anything yet that gives {kind} rows of {recipe.name}"
                f"{set_aside}: {SOURCES[name].remedy} first, or remove {name} from data.{rows_key(kind)}"
            )
        rows += [row for said in found for row in said.rows]
        made += [decision for said in found for decision in said.decisions]
        aside += [row for said in found for row in said.aside]
    return Said(rows, made, aside) if recipe.data.people(kind) else None
