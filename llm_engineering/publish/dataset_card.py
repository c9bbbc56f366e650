"""The dataset card: README.md with the metadata that the Hugging Face Hub reads, from facts and nothing else.

The metadata block follows the hub's dataset card specification (https://huggingface.co/docs/hub/datasets-cards).
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any, Literal

import yaml
from datasets import DatasetDict
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import SPLITS
from llm_engineering.recipe.data_blocks import HubConfig, RulesConfig

Kind = Literal["instruction", "preference"]
OWN_DATASET = "none: own dataset"
MAX_ORIGINS = 10

# The hub's size classes: below each bound, the class.
_SIZES = [
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
]
_USES = {"instruction": "supervised fine-tuning", "preference": "preference optimisation (DPO)"}
_COLUMNS = {
    "id": "hash of the row's content",
    "source": "file and place, or document and characters, that the row was made from",
    "origin": "who wrote the row",
    "document": "the source document; all rows of one document are in the same split",
    "prompt": "messages (`role`, `content`) up to the answer",
    "completion": "messages to learn, starting with an assistant turn",
    "chosen": "the better answer, as messages",
    "rejected": "the worse answer, as messages",
}


class StageCount(BaseModel):
    """What one stage read, kept and set aside, by reason."""

    model_config = ConfigDict(frozen=True)

    stage: str
    read: int
    kept: int
    set_aside: dict[str, int]


class CardFacts(BaseModel):
    """Everything that the card says.

    Attributes:
        documents: where the text comes from: `embedded:...`, a hub id, or the name of a file or folder.
        model: the model that wrote what is generated, with its revision; `OWN_DATASET` if nothing is.
        rows: by split.
        tokens: after formatting, of all splits; None if the dataset was not formatted yet.
        columns: of a row, in their order.
        origins: rows by who wrote them.
        limits: what the data is not good for, a sentence each.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Kind
    hub: HubConfig
    documents: str
    model: str
    prompts: dict[str, str]
    recipe_hash: str
    code_version: str
    stages: list[StageCount]
    rows: dict[str, int]
    tokens: int | None
    columns: list[str]
    origins: dict[str, int]
    limits: list[str]


def stage_counts(dataset: DatasetDict) -> list[StageCount]:
    """What the ledger stored beside the rows says, by stage."""
    ledger = Ledger.load(dataset)
    return [
        StageCount(
            stage=stage,
            read=ledger.read[stage],
            kept=ledger.kept[stage],
            set_aside=ledger.by_reason(stage),
        )
        for stage in ledger.read
    ]


def origins(dataset: DatasetDict) -> dict[str, int]:
    """Rows of all splits by who wrote them, most frequent first; what is rare stands together as `others`."""
    counts = Counter(origin for split in SPLITS for origin in dataset[split]["origin"])
    shown = dict(counts.most_common(MAX_ORIGINS))
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def limits(kind: Kind, own: bool, rules: RulesConfig) -> list[str]:
    """What a reader must know before using the rows. `own`: the rows were given, not generated."""
    if own:
        said = ["The rows were given as a dataset. Rules checked them; no person did so for this release."]
    elif kind == "instruction":
        said = [
            "Questions were written by a model. Answers were cut from documents or written by a model; "
            "`origin` says which.",
            "Rules checked the rows; no person did.",
        ]
    else:
        said = [
            "Rejected answers were written by a model; the chosen ones are those of the instruction dataset.",
            "An answer is the chosen one because of where it comes from: nobody compared the two.",
            "Rules checked the pairs; no person did.",
        ]
    for what, action in (("Personal data", rules.personal_data), ("Credentials", rules.secret)):
        if action == "off":
            said.append(f"{what}: not looked for.")
        elif action == "report":
            said.append(f"{what}: looked for by patterns, and what was found was left as it is.")
        else:
            done = {"mask": "masked", "drop": "dropped with its row"}[action]
            said.append(f"{what}: looked for by patterns, and what was found was {done}.")
    return said


def public_name(place: str) -> str:
    """A path of this machine without its folders; `embedded:` names, hub ids and relative names stay."""
    path = PurePath(place)
    return path.name or place if path.is_absolute() or place.startswith(("~", ".")) else place


def render_card(facts: CardFacts) -> str:
    """README.md: the hub's metadata as YAML, then the card as Markdown."""
    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    body = _CARD.render(f=facts, total=sum(facts.rows.values()), use=_USES[facts.kind], descriptions=_COLUMNS)
    return f"---\n{front}---\n\n{body}\n"


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The metadata block; `configs` tells `datasets.load_dataset` which file is which split."""
    total = sum(facts.rows.values())
    size = next((name for bound, name in _SIZES if total < bound), "n>1B")
    return {
        "license": facts.hub.license,
        **({"language": [facts.hub.language]} if facts.hub.language else {}),
        "pretty_name": f"{facts.name}: {facts.kind} dataset",
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": [
            "llm-engineering",
            "sft" if facts.kind == "instruction" else "dpo",
            *([] if facts.model == OWN_DATASET else ["synthetic"]),
        ],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": data_file(split)} for split in facts.rows],
            }
        ],
    }


def data_file(split: str) -> str:
    """Where a split lies in the repository."""
    return f"data/{split}.parquet"


def _cell(value: object) -> str:
    """Text for a table or a line: a bar would end the cell, a line break the row."""
    return " ".join(str(value).split()).replace("|", "\\|")


_environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 — Markdown
_environment.filters["cell"] = _cell
_CARD = _environment.from_string("""\
# {{ f.name }}: {{ f.kind }} dataset

{{ "{:,}".format(total) }} rows for {{ use }}, made by a recipe; the facts below are recorded by the runs that made it.

| | |
|---|---|
| documents | {{ f.documents | cell }} |
| generating model | {{ f.model | cell }} |
| prompts | {% for name, hash in f.prompts.items() %}{{ name | cell }} {{ hash }}{{ ", " if not loop.last else "" }}{% else %}none{% endfor %} |
| recipe | {{ f.recipe_hash }} |
| code | {{ f.code_version | cell }} |
| licence | {{ f.hub.license }} |
| tokens | {{ "{:,}, after formatting".format(f.tokens) if f.tokens is not none else "not counted" }} |

`prompts` and `recipe` are the hashes of the prompts' files and of the recipe, `code` is the version of the code.

## Rows

| split | rows |
|---|---|
{% for split, rows in f.rows.items() %}
| {{ split }} | {{ "{:,}".format(rows) }} |
{% endfor %}

| column | holds |
|---|---|
{% for column in f.columns %}
| `{{ column | cell }}` | {{ descriptions.get(column, "") }} |
{% endfor %}

| origin | rows |
|---|---|
{% for origin, rows in f.origins.items() %}
| {{ origin | cell }} | {{ "{:,}".format(rows) }} |
{% endfor %}

## What was kept, and what was not

Read = kept + set aside, in every stage.

| stage | read | kept | set aside |
|---|---|---|---|
{% for s in f.stages %}
| {{ s.stage | cell }} | {{ "{:,}".format(s.read) }} | {{ "{:,}".format(s.kept) }} | {% for reason, count in s.set_aside.items() %}{{ "{:,}".format(count) }} {{ reason | cell }}{{ ", " if not loop.last else "" }}{% else %}0{% endfor %} |
{% endfor %}

## Limits

{% for limit in f.limits %}
- {{ limit }}
{% endfor %}
""")
