"""The model card: README.md with the metadata that the Hugging Face Hub reads, from what the runs recorded.

The metadata block follows the hub's model card specification (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict

from llm_engineering.publish.dataset_card import public_name
from llm_engineering.publish.verification import Verification
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, ModelHubConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL

# Of what comes with the project.
_LICENCES = {EMBEDDED_MODEL: "apache-2.0", EMBEDDED_DOCUMENTS: "psf-2.0"}
_NOT_STATED = "not stated"
_GENERAL_LIMITS = [
    "It was measured on held-out rows of the same source as its training data, and on nothing else than what stands "
    "above.",
    "It was not tested for harmful, biased or wrong answers, and keeps those of its base model that training did not "
    "change. Facts it states must be checked.",
]


class DatasetFacts(BaseModel):
    """A dataset that the model was trained on.

    Attributes:
        source: documents or a dataset of one's own, without folders of this machine; `hash` is of its files.
        rows: by split.
        tokens: after formatting.
        version: of the registered artifact.
        sha256: of the artifact's files, where it was recorded.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    source: str
    hash: str
    rows: dict[str, int]
    tokens: int | None
    set_aside: int
    version: str
    sha256: str | None


class ModelCardFacts(BaseModel):
    """Everything that the card says; `recipe` is the one that the model was trained with.

    Attributes:
        stage: what the model ended with, `sft` or `dpo`.
        report: the JSON of the evaluation report.
        data_limits: what readers of the data must know, a sentence each.
        lineage: what leads back to the run, as text by name.
    """

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    hub: ModelHubConfig | None
    version: int
    stage: str
    datasets: list[DatasetFacts]
    report: dict[str, Any]
    verification: Verification
    data_limits: list[str]
    lineage: dict[str, str]


def base_licence(base: str, hub: ModelHubConfig | None) -> str | None:
    """The licence of a base model, by its name in the recipe, where it is known."""
    return _LICENCES.get(base) or (hub.base_license if hub is not None else None)


def data_licence(recipe: Recipe) -> str | None:
    """The licence of the data, where it is known: of the embedded corpus, or as the recipe's `data.hub` says."""
    if recipe.data.hub is not None:
        return recipe.data.hub.license
    own = recipe.data.instructions or recipe.data.preferences
    return None if own else _LICENCES.get(recipe.documents.path)


def render_model_card(facts: ModelCardFacts) -> str:
    """README.md: the hub's metadata as YAML, then the card as Markdown."""
    recipe = facts.recipe
    settings = recipe.model_dump(mode="json", include={"seed", "formatting", "sft", *_dpo(facts)})
    if recipe.sft.method == "full":
        del settings["sft"]["lora"]
    template = recipe.formatting.chat_template
    if template is not None:
        # A file of this machine, or a name.
        settings["formatting"]["chat_template"] = public_name(template)
    body = _CARD.render(
        f=facts,
        base=public_name(recipe.model.name_or_path),
        base_licence=base_licence(recipe.model.name_or_path, facts.hub) or _NOT_STATED,
        data_licence=data_licence(recipe) or _NOT_STATED,
        method="a full fine-tune" if recipe.sft.method == "full" else f"an adapter ({recipe.sft.method}), merged",
        steps="supervised fine-tuning" + (" and direct preference optimisation" if facts.stage == "dpo" else ""),
        recipe=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
        measures=_measures(facts.report),
        differences=_differences(facts.report),
        limits=[*_GENERAL_LIMITS, *facts.data_limits],
    )
    return f"---\n{_metadata(facts)}\n---\n\n{body}\n"


def _dpo(facts: ModelCardFacts) -> list[str]:
    return ["dpo"] if facts.stage == "dpo" else []


def _metadata(facts: ModelCardFacts) -> str:
    name = facts.recipe.model.name_or_path
    is_folder = public_name(name) != name or (facts.recipe.model.revision or "").startswith("folder-")
    is_hub_id = not name.startswith("embedded:") and not is_folder
    hub = facts.hub
    return str(
        ModelCardData(
            license=hub.license if hub is not None else None,
            language=hub.language if hub is not None else None,
            base_model=name if is_hub_id else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["llm-engineering", "sft", *_dpo(facts)],
        ).to_yaml()
    )


def _measures(report: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Title, unit, and a cell for each model of the report, in its order."""
    return [
        (measure["title"], measure["unit"], [_cell(measure["models"].get(name)) for name in report["models"]])
        for measure in report["measures"].values()
    ]


def _differences(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, unit and value of what sets the model apart from its base."""
    return [
        (f"{measure['title']}: {pair.replace('-', ' minus ')}", measure["unit"], _cell(found))
        for measure in report["measures"].values()
        for pair, found in measure["differences"].items()
        if pair.endswith("-base")
    ]


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['value']:.3f} (n = {found['n']})"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] (n = {found['n']})"


_environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 — Markdown
_environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
_CARD = _environment.from_string("""\
# {{ f.recipe.name }}, version {{ f.version }}

{{ base | cell }} after {{ steps }}: {{ method }}. The facts below are those that the runs recorded.

| | |
|---|---|
| base model | {{ base | cell }}, {{ f.recipe.model.revision | cell }} |
| licence of this model | {{ f.hub.license if f.hub else "not stated" }} |
| licence of the base model | {{ base_licence }} |
| licence of the data | {{ data_licence }} |
| weights | {{ f.verification.dtype }}, safetensors |

Ask it with its own chat template, which comes with the tokenizer: it was trained with that and no other.
{% if f.recipe.evaluation.repetition_penalty != 1 %}
Its answers were measured with a repetition penalty of {{ f.recipe.evaluation.repetition_penalty }}, which \
generation_config.json asks for wherever it is read; llama.cpp is told by `--repeat-penalty`.
{% endif %}

## Data

| dataset | source | rows | tokens | set aside | version |
|---|---|---|---|---|---|
{% for d in f.datasets %}
| {{ d.name | cell }} | {{ d.source | cell }} | {% for split, rows in d.rows.items() %}{{ split }} {{ "{:,}".format(rows) }}{{ ", " if not loop.last else "" }}{% endfor %} | {{ "{:,}".format(d.tokens) if d.tokens is not none else "not counted" }} | {{ "{:,}".format(d.set_aside) }} | {{ d.version }} |
{% endfor %}

| dataset | hash of the source | SHA-256 of the dataset |
|---|---|---|
{% for d in f.datasets %}
| {{ d.name | cell }} | {{ d.hash | cell }} | {{ d.sha256 or "not recorded" }} |
{% endfor %}

## Recipe

```yaml
{{ recipe }}
```

## Measures

On {{ f.report.heldout_rows }} held-out rows{% if f.report.heldout_pairs %} and {{ f.report.heldout_pairs }} held-out pairs{% endif %}, which no training saw; in brackets the bootstrap interval
over rows{% if f.report.confidence is defined %} at {{ "{:.0%}".format(f.report.confidence) }}{% endif %}.

| measure | unit | {{ f.report.models | join(" | ") }} |
|---|---|{{ "---|" * f.report.models | length }}
{% for title, unit, cells in measures %}
| {{ title | cell }} | {{ unit | cell }} | {{ cells | join(" | ") }} |
{% endfor %}

| difference | unit | value |
|---|---|---|
{% for title, unit, value in differences %}
| {{ title | cell }} | {{ unit | cell }} | {{ value }} |
{% endfor %}

The measures are of the model as it was trained. These files were held to it: {{ f.verification.sentence }}.

## Lineage

| | |
|---|---|
{% for name, value in f.lineage.items() %}
| {{ name | cell }} | {{ value | cell }} |
{% endfor %}

## Limits

{% for limit in limits %}
- {{ limit }}
{% endfor %}
""")
