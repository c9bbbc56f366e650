"""`models compare` with versions that differ in the recipe alone, in the held-out rows, and in the base model."""

import json

import pytest

from llm_engineering.evaluation.row_values import OTHER_ROWS, OTHER_TOKENS, UNKNOWN_ROWS
from tests.integration.conftest import make_project
from tools.make import GIVEN
from tools.make import command as command_of


@pytest.fixture(scope="module")
def versions(tiny_model, small_llama, unused, tmp_path_factory):
    """A project with four versions: the second has another learning rate, the third fewer rows, the fourth another base model."""
    project = make_project(tmp_path_factory.mktemp("versions"), tiny_model, unused)
    project.env["OMP_NUM_THREADS"] = "1"
    more = ("--set", "evaluation.generated_rows=4", "--set", "evaluation.sample_answers=4")
    project.done = [project.run("sft", *more), project.run("sft", *more, "--set", "sft.learning_rate=1e-4")]
    lines = project.folder / "instructions.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:40]))
    project.done.append(project.run("sft", *more))
    other = (f"model.name_or_path={small_llama}", "formatting.chat_template=chatml", "formatting.max_length=384")
    project.done.append(project.run("sft", *more, *(word for key in other for word in ("--set", key))))
    for run in project.done:
        assert run.code == 0, run.stderr
    return project


def compared(project, *numbers):
    found = project.command("models", "compare", *numbers, "--config", str(project.recipe), "--json")
    assert found.code == 0, found.stderr
    return found.json


def test_versions_on_the_same_rows_are_compared_with_paired_intervals(versions):
    data = compared(versions, "1", "2")
    assert data["recipes"] == [["sft.learning_rate", "0.01", "0.0001"]]
    assert data["data"] == []
    losses = [run.json["metrics"]["heldout_loss_sft"] for run in versions.done[:2]]
    measure = data["measures"]["heldout_loss"]
    assert [measure[side]["value"] for side in ("first", "second")] == losses
    assert measure["difference"]["value"] == pytest.approx(losses[1] - losses[0], abs=1e-4)
    assert measure["difference"]["low"] < measure["difference"]["value"] < measure["difference"]["high"]
    assert all(measure["reason"] == "" for measure in data["measures"].values())
    assert len(data["answers"]) == 4
    page = (versions.folder / "outputs" / "comparisons" / "tiny-1-2" / "report.html").read_text()
    for words in ("version 1 and version 2", "Validation loss of sft", "sft.learning_rate", "side by side"):
        assert words in page
    assert page.count("<svg") == 2


def test_versions_with_other_held_out_rows_are_not_compared(versions):
    data = compared(versions, "2", "3")
    assert [row[0] for row in data["recipes"]] == ["sft.learning_rate"]
    changed = {row[0]: row[1:] for row in data["data"]}
    assert changed["instruction, kept"][0] > changed["instruction, kept"][1]
    assert "instruction_dataset, SHA-256" in changed
    assert any(name.endswith("instructions.jsonl, SHA-256") for name in changed)
    measure = data["measures"]["heldout_loss"]
    assert (measure["difference"], measure["reason"]) == (None, OTHER_ROWS)
    shown = versions.command(
        *command_of("compare-versions", {"VERSIONS": "2 3", "CONFIG": str(versions.recipe), GIVEN: "VERSIONS CONFIG"})
    )
    assert shown.code == 0, shown.stderr
    assert "No measure of version 2 and version 3 can be compared." in shown.stdout
    assert "comparable:" in shown.stdout


def test_versions_on_other_base_models_are_compared_by_measures_that_count_no_tokens(versions, tiny_model, small_llama):
    """With another tokenizer an answer has another number of tokens, so a loss per token means something else."""
    data = compared(versions, "3", "4")
    assert ["model.name_or_path", str(tiny_model), str(small_llama)] in data["recipes"]
    assert data["data"] == []
    for name in ("heldout_loss", "perplexity", "question_gain", "length_ratio"):
        assert (data["measures"][name]["difference"], data["measures"][name]["reason"]) == (None, OTHER_TOKENS)
    assert data["measures"]["rouge_l"]["difference"] is not None
    assert [str(folder) in fact for folder, fact in zip((tiny_model, small_llama), data["facts"].values(), strict=True)]


def test_a_report_without_values_of_rows_says_so(versions):
    """As those of earlier versions of this project."""
    files = [json.loads(file.read_text()) for file in versions.folder.glob("stores/**/report.json")]
    assert sum("row_values" in report for report in files) == 4
    for file in versions.folder.glob("stores/**/report.json"):
        report = json.loads(file.read_text())
        if report.pop("row_values", None):
            file.write_text(json.dumps(report))
    assert compared(versions, "1", "2")["measures"]["heldout_loss"]["reason"] == UNKNOWN_ROWS


def test_wrong_versions_are_refused(versions):
    for numbers, words in ((("1", "1"), "Both versions are 1"), (("1", "9"), "There is no version 9 of tiny")):
        found = versions.command("models", "compare", *numbers, "--config", str(versions.recipe))
        assert found.code == 2
        assert words in found.stderr
