"""The whole chain in ZenML, with a model of two small layers and the real tokenizer."""

import json
from pathlib import Path

import pytest

from tests.integration.conftest import PLANTED

READ_BACK = """
import json, sys
import tools.cli
from zenml.client import Client
import steps.materializers
found = {}
for version in Client().list_artifact_versions(size=1000, hydrate=True).items:
    value = version.load()
    kind = type(value).__name__
    rows = {name: len(part) for name, part in value.items()} if kind == "DatasetDict" else None
    files = sorted(f.name for f in value.path.rglob("*") if f.is_file()) if kind == "Directory" else None
    found[version.artifact.name] = {"kind": kind, "rows": rows, "files": files, "metadata": dict(version.run_metadata)}
def linked(version):
    links = Client().list_model_version_artifact_links(model_version_id=version.id, size=100, hydrate=True).items
    return sorted({link.artifact_version.artifact.name for link in links})
models = [
    {"number": v.number, "stage": v.stage, "metadata": dict(v.run_metadata), "artifacts": linked(v)}
    for v in Client().list_model_versions(model="tiny", hydrate=True).items
]
print(json.dumps({"artifacts": found, "models": models}, default=str))
"""


@pytest.fixture(scope="module")
def dpo_run(project, finished_run):
    run = project.run("dpo")
    assert run.code == 0, run.stderr
    return run


def test_sft_run_prints_metrics_and_artifacts(project, finished_run):
    result = finished_run.result.json
    assert result["status"] == "completed"
    assert result["pipeline"] == "sft"
    assert result["metrics"]["heldout_loss_sft"] < result["metrics"]["heldout_loss_base"]
    assert result["metrics"]["tokens_per_second"] > 0
    assert result["comet"]["archive"].endswith(".zip")
    assert not list(project.folder.glob("outputs/training/*/checkpoints"))
    assert {"instruction_dataset", "formatted_sft", "sft_adapter", "training_report", "data_report",
            "evaluation_report", "promotion_decision"} <= result["artifacts"].keys()  # fmt: skip


def test_broken_lines_are_reported(finished_run):
    assert "malformed 3" in finished_run.result.stderr
    assert "Error" not in finished_run.result.stderr


def test_dpo_starts_from_the_registered_sft_model(finished_run, dpo_run):
    assert "The stage after sft starts from its adapter version 1" in dpo_run.stderr
    assert "Running sft" not in dpo_run.stderr
    metrics = dpo_run.json["metrics"]
    assert metrics["heldout_loss_sft"] == pytest.approx(finished_run.result.json["metrics"]["heldout_loss_sft"])
    for name in ("heldout_loss_dpo", "preference_accuracy_sft", "preference_accuracy_dpo"):
        assert name in metrics


def test_a_version_that_another_was_trained_from_is_not_deleted(project, dpo_run):
    run = project.command("models", "delete", "1", "--yes", "--config", str(project.recipe))
    assert run.code == 2
    assert "tiny version 1 cannot be deleted." in run.stderr
    assert "tiny version 2 was trained from it, and its origin must stay: first delete tiny version 2." in run.stderr


def test_every_artifact_is_read_back_in_a_fresh_process(project, dpo_run):
    process = project.command("runs", "--limit", "5")
    assert process.code == 0
    assert "dpo" in process.stdout
    script = project.folder / "read_back.py"
    script.write_text(READ_BACK)
    done = project.script(str(script))
    assert done.code == 0, done.stderr
    found = done.json
    artifacts = found["artifacts"]
    tables = {"train", "validation", "test", "findings", "clusters", "suspicious", "quarantine", "counts"}
    assert artifacts["instruction_dataset"]["rows"].keys() == tables
    assert artifacts["instruction_dataset"]["rows"]["quarantine"] == 3
    assert artifacts["instruction_dataset"]["metadata"]["rows"] == 60
    assert artifacts["preference_dataset"]["kind"] == "DatasetDict"
    for name in ("sft_adapter", "dpo_adapter"):
        assert "adapter_model.safetensors" in artifacts[name]["files"]
        assert artifacts[name]["metadata"]["base_revision"].startswith("folder-")
    for name in ("data_report", "training_report"):
        assert {"report.json", "report.html"} <= set(artifacts[name]["files"])
    assert "report.json" in artifacts["evaluation_report"]["files"]
    assert "report.html" in artifacts["evaluation_page"]["files"]
    assert artifacts["promotion_decision"]["kind"] == "PromotionDecision"
    # Every file of the store is Arrow, safetensors, JSON, HTML or text. None is a pickle.
    endings = {file.suffix for file in (project.folder / "stores").rglob("*") if file.is_file()}
    assert not endings & {".pkl", ".pickle", ".bin", ".pt", ".pth"}, endings

    newest = max(found["models"], key=lambda version: version["number"])
    assert {"dpo_adapter", "sft_adapter", "preference_dataset", "instruction_dataset", "evaluation_report"} <= set(
        newest["artifacts"]
    )
    assert {"heldout_loss_dpo", "recipe_hash", "code_version", "recipe"} <= newest["metadata"].keys()


def test_secrets_are_nowhere(project, finished_run, dpo_run):
    for run in (finished_run.result, dpo_run):
        assert PLANTED not in run.stdout + run.stderr
    for file in project.folder.rglob("*"):
        if file.is_file():
            assert PLANTED.encode() not in file.read_bytes(), file


def test_unchanged_run_comes_from_the_cache(project, finished_run):
    again = project.run("sft")
    assert again.code == 0
    # Only the gate runs, because it acts on the new model version.
    ran = [line for line in again.stderr.splitlines() if "│ sft: " in line and "completed" in line]
    assert len(ran) == 1
    assert "promote" in ran[0]
    assert again.json["metrics"] == finished_run.result.json["metrics"]


def test_reports_show_curves_and_labels(project, finished_run):
    folder = finished_run.result.json["artifacts"]["training_report"]["uri"]
    page = Path(folder, "files", "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("<svg") >= 3
    # The last token of each row is the end of turn, and it is trained.
    assert page.count('<span class="e">&lt;|im_end|&gt;</span></p>') == 3


def test_the_evaluation_reports_intervals(project, dpo_run):
    folder = Path(dpo_run.json["artifacts"]["evaluation_report"]["uri"], "files")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["models"][:3] == ["base", "sft", "dpo"]
    assert {"heldout_loss", "preference_accuracy", "rouge_l", "stopped"} <= report["measures"].keys()
    gain = report["measures"]["heldout_loss"]["differences"]["dpo-base"]
    assert gain["low"] < gain["value"] < gain["high"] < 0
    assert dpo_run.json["metrics"]["heldout_loss_dpo"] == report["measures"]["heldout_loss"]["models"]["dpo"]["value"]
    assert len(report["samples"]) == min(20, report["heldout_rows"])
    page = Path(dpo_run.json["artifacts"]["evaluation_page"]["uri"], "files", "report.html").read_text(encoding="utf-8")
    stored = Path(dpo_run.json["artifacts"]["promotion_decision"]["uri"]).glob("*.json")
    decision = next(found for file in stored if "outcome" in (found := json.loads(file.read_text(encoding="utf-8"))))
    for words in ("Training of dpo", "heldout_loss better than base by more than 0"):
        assert words in page
    assert ("Gate passed" in page, "Gate refused" in page) == (decision["passed"], not decision["passed"])


def test_documents_to_datasets_with_the_real_model(fresh_project):
    """The embedded model generates questions for passages of the embedded corpus."""
    run = fresh_project.command(
        "run", "datasets", "--json", "--set", "documents.max_passages=12", "--set",
        "data.split.test_fraction=0.4", "--set", "data.split.validation_fraction=0.3", "--set",
        "generation.rejected_max_new_tokens=12",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    assert {"documents", "instruction_dataset", "preference_dataset"} <= run.json["artifacts"].keys()
    assert run.json["metrics"] == {}
