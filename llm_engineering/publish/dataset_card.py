"""Renders the dataset card: README.md with the metadata that the Hugging Face Hub reads, from recorded facts only.

The metadata block follows the hub's dataset card specification (https://huggingface.co/docs/hub/datasets-cards).
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any, Literal

import yaml
from datasets import DatasetDict
from jinja2 import Environment, StrictUndefined, Template
from pydantic import BaseModel, ConfigDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import SPLITS
from llm_engineering.recipe.data_blocks import DataConfig, HubConfig

Kind = Literal["instruction", "preference", "labelled", "prompt"]
OWN_DATASET = "none: own dataset"
# Where rows come from, and which model wrote their answers, if people said all of them.
PEOPLE_SAID, SERVED = "feedback of people", "the models that were served"
MAX_ORIGINS = 10

# The hub's size classes; each applies below its bound.
_SIZES = [
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
]
_USES = {
    "instruction": "supervised fine-tuning",
    "preference": "preference optimisation (DPO)",
    "labelled": "preference optimisation (KTO)",
    "prompt": "reinforcement learning with rewards (GRPO, RLOO)",
}
_TAGS = {"instruction": "sft", "preference": "dpo", "labelled": "kto", "prompt": "grpo"}
_COLUMNS = {
    "id": "hash of the row's content",
    "source": "file and place, or document and characters, from which the row was made",
    "origin": "who wrote the row",
    "document": "the source document; all rows of one document are in the same split",
    "prompt": "messages (`role`, `content`) up to the answer",
    "completion": "messages to learn, starting with an assistant turn",
    "chosen": "the better answer, as messages",
    "rejected": "the worse answer, as messages",
    "answers": "the accepted answers, as texts",
    "label": "whether the completion is a good answer",
}


class StageCount(BaseModel):
    """The rows that a stage read, kept and set aside; `set_aside` is by reason."""

    model_config = ConfigDict(frozen=True)

    stage: str
    read: int
    kept: int
    set_aside: dict[str, int]


class CardFacts(BaseModel):
    """All facts of the card.

    Attributes:
        documents: the source of the text: `embedded:...`, a hub id, or the name of a file or folder.
        model: the generating model with its revision; `OWN_DATASET` if nothing was generated.
        prompts: hashes of the prompt files, by name.
        rows: number of rows by split.
        tokens: tokens of all splits after formatting; None if the dataset was not formatted yet.
        columns: the columns of a row, in their order.
        origins: number of rows by their origin.
        limits: the limits of the data, a sentence each.
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
    """The counts of the ledger that is stored with the rows, by stage."""
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
    """Number of rows of all splits by origin, the most frequent first; rare origins are counted as `others`."""
    counts = Counter(origin for split in SPLITS for origin in dataset[split]["origin"])
    shown = dict(counts.most_common(MAX_ORIGINS))
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def limits(kind: str, data: DataConfig) -> list[str]:
    """The limits of the rows of a kind, a sentence each. `data` says where the rows come from."""
    if data.own(kind) is not None:
        sentences = ["The rows are an existing dataset. Rules checked them; nobody reviewed them for this release."]
    elif kind == "text":
        sentences = ["The texts are documents as they are. Rules checked them; nobody reviewed them for this release."]
    elif kind in ("instruction", "prompt"):
        sentences = [
            "A model wrote the questions. The answers were cut from documents or written by a model, as `origin` says.",
            "Rules checked the rows; nobody reviewed them.",
        ]
    elif data.only_people(kind):
        sentences = [
            "A person judged each answer that was served, or wrote a better one.",
            "Rules checked the rows; nobody reviewed them.",
        ]
    elif kind == "labelled":
        sentences = [
            "A model wrote the bad answers; the good answers are those of the instruction dataset.",
            "The origin of an answer decides its label: nobody judged the answers.",
            "Rules checked the rows; nobody reviewed them.",
        ]
    else:
        sentences = [
            "A model wrote the rejected answers; the chosen answers are those of the instruction dataset.",
            "The origin of an answer decides whether it is the chosen one: nobody compared the two answers.",
            "Rules checked the pairs; nobody reviewed them.",
        ]
    if data.people(kind):
        sentences = [sentence.replace("nobody", "nobody else") for sentence in sentences]
        sentences.insert(0, "People wrote or judged the rows of the origin `human`, in reviews or by feedback.")
    for kind_of_data, action in (("Personal data", data.rules.personal_data), ("Credentials", data.rules.secret)):
        if action == "off":
            sentences.append(f"{kind_of_data}: not searched for.")
        elif action == "report":
            sentences.append(f"{kind_of_data}: searched for with patterns, and left unchanged.")
        else:
            done = {"mask": "masked", "drop": "dropped with the whole row"}[action]
            sentences.append(f"{kind_of_data}: searched for with patterns, and {done}.")
    return sentences


def public_name(place: str) -> str:
    """The name of a path without its folders; `embedded:` names, hub ids and relative names stay unchanged."""
    path = PurePath(place)
    return path.name or place if path.is_absolute() or place.startswith(("~", ".")) else place


def render_card(facts: CardFacts) -> str:
    """Render README.md: the hub's metadata as YAML, then the card as Markdown."""
    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    body = _CARD.render(f=facts, total=sum(facts.rows.values()), use=_USES[facts.kind], descriptions=_COLUMNS)
    return f"---\n{front}---\n\n{body}\n"


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The metadata block; `configs` tells `datasets.load_dataset` which file belongs to which split."""
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
            _TAGS[facts.kind],
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
    """The path of a split in the repository."""
    return f"data/{split}.parquet"


def card_template(text: str) -> Template:
    """A Markdown template with the filter `cell` for texts in tables, where a bar ends the cell and a line break the row."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 — Markdown
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    return environment.from_string(text)


_CARD = card_template("""\
# {{ f.name }}: {{ f.kind }} dataset

{{ "{:,}".format(total) }} rows for {{ use }}, made by a recipe. The runs that made the dataset recorded the facts below.

| | |
|---|---|
| documents | {{ f.documents | cell }} |
| generating model | {{ f.model | cell }} |
| prompts | {% for name, hash in f.prompts.items() %}{{ name | cell }} {{ hash }}{{ ", " if not loop.last else "" }}{% else %}none{% endfor %} |
| recipe | {{ f.recipe_hash }} |
| code | {{ f.code_version | cell }} |
| licence | {{ f.hub.license }} |
| tokens | {{ "{:,}, after formatting".format(f.tokens) if f.tokens is not none else "not counted" }} |

`prompts` and `recipe` are hashes of the prompt files and of the recipe. `code` is the version of the code.

## Rows

| split | rows |
|---|---|
{% for split, rows in f.rows.items() %}
| {{ split }} | {{ "{:,}".format(rows) }} |
{% endfor %}

| column | content |
|---|---|
{% for column in f.columns %}
| `{{ column | cell }}` | {{ descriptions.get(column, "") }} |
{% endfor %}

| origin | rows |
|---|---|
{% for origin, rows in f.origins.items() %}
| {{ origin | cell }} | {{ "{:,}".format(rows) }} |
{% endfor %}

## Rows by stage

In every stage, read = kept + set aside.

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
