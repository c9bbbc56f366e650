"""Renders the model card: README.md with the metadata that the Hugging Face Hub reads, from recorded facts only.

The metadata block follows the hub's model card specification (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from pydantic import BaseModel, ConfigDict

from llm_engineering.publish.dataset_card import card_template, public_name
from llm_engineering.publish.verification import FileCheck, Verification
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, EMBEDDED_HANDBOOK, HubConfig, ModelHubConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stages import STAGES

# Licences of the model and the documents that come with the project.
_LICENCES = {EMBEDDED_MODEL: "apache-2.0", EMBEDDED_DOCUMENTS: "psf-2.0", EMBEDDED_HANDBOOK: "apache-2.0"}
_NOT_STATED = "not stated"
_GENERAL_LIMITS = [
    "It was measured only as shown above, on held-out rows from the same source as its training data.",
    "It was not tested for harmful, biased or wrong answers, and may give the ones that its base model gives. Check the "
    "facts that it states.",
]


class DatasetFacts(BaseModel):
    """A dataset that the model was trained on.

    Attributes:
        source: the documents, the user's own dataset without folders of this machine, or `PEOPLE_SAID`.
        hash: hash of the files of `source`, or of the artifact with what people said.
        rows: number of rows by split.
        tokens: number of tokens after formatting, if they were counted.
        set_aside: number of rows that the checks set aside.
        sha256: hash of the artifact's files, if it was recorded.
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
    """All facts of the card.

    Attributes:
        recipe: the recipe that the model was trained with.
        report: the JSON of the evaluation report.
        data_limits: the limits of the data, a sentence each.
        lineage: the run, its code and so on, as text by name.
        file: what was measured on the quantised or GGUF file that the card is about; None for the merged model.
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
    file: FileCheck | None = None


def base_licence(base: str, hub: ModelHubConfig | None) -> str | None:
    """The licence of a base model, by its name in the recipe; None if it is not known."""
    return _LICENCES.get(base) or (hub.base_license if hub is not None else None)


def data_licence(recipe: Recipe) -> str | None:
    """The licence in the recipe's `data.hub`, or of the embedded documents; None if it is not known."""
    hub: HubConfig | None = recipe.data.hub
    if hub is not None:
        return hub.license
    own = any(recipe.data.file(kind) for kind in ("instruction", "preference", "labelled"))
    return None if own else _LICENCES.get(recipe.documents.path)


def render_model_card(facts: ModelCardFacts) -> str:
    """Render README.md: the hub's metadata as YAML, then the card as Markdown."""
    recipe = facts.recipe
    chain = recipe.chain_to(facts.stage)
    settings = recipe.model_dump(mode="json", include={"seed", "formatting", *chain})
    for stage in chain:
        # The adapter's settings are those of the first stage; the others have none.
        settings[stage] = {k: v for k, v in settings[stage].items() if v is not None or k not in ("method", "lora")}
    for reward in (reward for stage in chain for reward in settings[stage].get("rewards", [])):
        reward["use"] = public_name(reward["use"])
    template = recipe.formatting.chat_template
    if template is not None:
        # The template may be a file of this machine.
        settings["formatting"]["chat_template"] = public_name(template)
    body = _CARD.render(
        f=facts,
        base=public_name(recipe.model.name_or_path),
        base_licence=base_licence(recipe.model.name_or_path, facts.hub) or _NOT_STATED,
        data_licence=data_licence(recipe) or _NOT_STATED,
        method="a full fine-tune" if recipe.method == "full" else f"an adapter ({recipe.method}), merged",
        steps=", then ".join(STAGES[stage].title for stage in chain),
        recipe=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
        measures=_measures(facts.report),
        differences=_differences(facts.report),
        limits=[*_GENERAL_LIMITS, *facts.data_limits],
    )
    return f"---\n{_metadata(facts)}\n---\n\n{body}\n"


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
            library_name="transformers" if facts.file is None else facts.file.computed_by,
            pipeline_tag="text-generation",
            tags=["llm-engineering", *facts.recipe.chain_to(facts.stage)],
        ).to_yaml()
    )


def _measures(report: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Title, unit, and a cell for each model of the report, in its order."""
    return [
        (measure["title"], measure["unit"], [_cell(measure["models"].get(name)) for name in report["models"]])
        for measure in report["measures"].values()
    ]


def _differences(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, unit and value of each difference from the base model."""
    return [
        (f"{measure['title']}: {pair.replace('-', ' minus ')}", measure["unit"], _cell(estimate))
        for measure in report["measures"].values()
        for pair, estimate in measure["differences"].items()
        if pair.endswith("-base")
    ]


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{interval} (n = {estimate['n']})"


_CARD = card_template("""\
# {{ f.recipe.name }}, version {{ f.version }}

{{ base | cell }} after {{ steps }}: {{ method }}. The runs that made the model recorded the facts below.

| | |
|---|---|
| base model | {{ base | cell }}, {{ f.recipe.model.revision | cell }} |
| licence of this model | {{ f.hub.license if f.hub else "not stated" }} |
| licence of the base model | {{ base_licence }} |
| licence of the data | {{ data_licence }} |
| weights | {{ f.file.described if f.file else f.verification.dtype ~ ", safetensors" }} |

Use it with its own chat template, which is part of the tokenizer: it was trained with this template only.
{% if f.recipe.evaluation.repetition_penalty != 1 %}
Its answers were measured with a repetition penalty of {{ f.recipe.evaluation.repetition_penalty }}. \
generation_config.json sets it; for llama.cpp, pass `--repeat-penalty`.
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

Measured on {{ f.report.heldout_rows }} held-out rows{% if f.report.heldout_pairs %} and {{ f.report.heldout_pairs }} held-out pairs{% endif %}, which were not trained on.
Brackets show the {% if f.report.confidence is defined %}{{ "{:.0%}".format(f.report.confidence) }} {% endif %}confidence interval over documents and facts.

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

The measures are of the model as it was trained. These files were compared with it: {{ f.verification.sentence }}.
{% if f.file %}

The {{ f.file.file_format }} file was then compared with the merged model: {{ f.file.sentence }}.
{% endif %}

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
