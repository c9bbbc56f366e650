"""The page of `models evidence`: what a version was made of, with which operations, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from llm_engineering.reports.page import details, estimated, page, paragraph, table

# The European Commission's guidelines of July 2025 on general-purpose AI models: whoever modifies a model with more than
# this share of its training operations counts as a provider of the modified model.
THRESHOLD = 1 / 3
_UNKNOWN = (
    "The operations of the base model's training are unknown: set hub.base_training_tokens in the recipe. Where they cannot "
    "be estimated, the guidelines take a third of 10²³ as the threshold."
)


def evidence_page(evidence: Mapping[str, Any]) -> str:
    """The whole page, from the JSON of the evidence."""
    model, base, licences = evidence["model"], evidence["base"], evidence["licences"]
    facts = {
        "Model": model["name"],
        "Version": str(model["version"]),
        "Stage": model["stage"] or "none",
        "Base model": f"{base['name']}, {base['revision']}",
    }
    rows = [[name.replace("_", " "), licence or "not stated"] for name, licence in licences.items()]
    signatures = [[s["version"], s["created"], s["facts"]] for s in evidence["signatures"]]
    sections = [
        ("Training content", _content(evidence)),
        ("Licences", table(["Of", "Licence"], rows)),
        ("Training operations", _compute(evidence["compute"])),
        ("Measures", _measures(evidence)),
        ("Limits", Markup("").join(paragraph(limit) for limit in evidence["limits"])),
        ("Signatures", table(["Signature", "Made", "What"], signatures) or paragraph("Not signed.")),
        ("Replay", paragraph(_replay(evidence["replay"]))),
        ("Lineage", table(["What", "Value"], list(model["lineage"].items()))),
        (
            "Bill of materials",
            paragraph("bom.cdx.json lists the same parts in CycloneDX 1.6.")
            + details(
                f"{len(evidence['packages'])} packages that were installed where the model was trained",
                table(["Package", "Version"], list(evidence["packages"].items())),
            ),
        ),
    ]
    return page("Evidence", _lead(evidence), sections, facts=facts)


def _lead(evidence: Mapping[str, Any]) -> list[str]:
    rows = sum(sum(data["rows"].values()) for data in evidence["datasets"])
    signed = "It is signed." if evidence["signatures"] else "It is not signed."
    return [f"The version was made of {len(evidence['datasets'])} datasets with {rows:,} rows. {signed}"]


def _content(evidence: Mapping[str, Any]) -> Markup:
    datasets = [
        [data["name"], data["source"], *(data["rows"].get(split, 0) for split in ("train", "validation", "test")),
         data["tokens"] if data["tokens"] is not None else "not counted", data["set_aside"]]
        for data in evidence["datasets"]
    ]  # fmt: skip
    origins = [
        [data["name"], origin, count] for data in evidence["datasets"] for origin, count in data["origins"].items()
    ]
    people = [
        [
            name,
            ", ".join(f"{who} ({count})" for who, count in said["by"].items()),
            said["first"][:16],
            said["last"][:16],
        ]
        for name, said in evidence["people"].items()
    ]
    head = ["Dataset", "Source", "Train", "Validation", "Test", "Tokens", "Set aside"]
    said = table(["Artifact", "By, rows of each", "From", "To"], people) or paragraph("No rows of people.")
    files = evidence["sources"]
    read = table(["Read by", "File", "SHA-256"], files)
    return (
        table(head, datasets)
        + table(["Dataset", "Origin of the row", "Rows"], origins)
        + said
        + (details(f"{len(files)} files that were read", read) if files else Markup(""))
    )


def _compute(compute: Mapping[str, Any]) -> Markup:
    rows: list[list[str]] = [[name, _flops(value)] for name, value in compute["stages"].items()]
    rows += [["all stages", _flops(compute["total"])], ["base model, 6·N·D", _flops(compute["base_flops"])]]
    share, said = compute["share"], _UNKNOWN
    if share is not None:
        said = (
            f"The base model has N = {compute['base_parameters']:,} parameters and was trained on D = "
            f"{compute['base_tokens']:.3g} tokens. "
            f"The training took {share:.3g} of these operations, {'more' if share > THRESHOLD else 'less'} than the third "
            "at which the European Commission's guidelines on general-purpose AI models see a new provider."
        )
    beside = "Writing the data and the answers of GRPO and RLOO, and evaluation, are not counted."
    return table(["Training", "Operations (FLOP)"], rows) + paragraph(said) + paragraph(beside)


def _flops(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _measures(evidence: Mapping[str, Any]) -> Markup:
    rows = [
        [
            measure["title"],
            measure["unit"],
            name,
            estimated(estimate),
            estimate["n"],
        ]
        for measure in evidence["measures"].values()
        for name, estimate in measure["models"].items()
    ]
    return table(["Measure", "Unit", "Model", "Value and interval", "n"], rows) or paragraph("Not evaluated.")


def _replay(replay: Mapping[str, Any] | None) -> str:
    if replay is None:
        return "Not replayed: make replay trains the version again and compares."
    differing = [one["what"] for one in replay["compared"] if one["difference"]]
    return f"A replay differed in {', '.join(differing)}." if differing else "A replay was equal, byte for byte."
