"""Wrong requests end with one sentence and an exit code, without a traceback, and start nothing."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import load_from_disk

from tests.integration.conftest import make_project

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "sft.learning_rat=1"], "Did you mean `sft.learning_rate`?"),
        (["--set", "sft.num_train_epochs=many"], "`sft.num_train_epochs` is 'many'"),
        (["--config", "nowhere.yaml"], "There is no recipe file nowhere.yaml"),
        (["--set", "data.instructions=nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--set", "data.instructions=README.md"], "README.md is in no known format"),
        (["--set", "data.decontaminate_against=[nowhere.jsonl]"], "There is no file nowhere.jsonl"),
        (["--set", "evaluation.checks=nowhere.jsonl"], "evaluation.checks nowhere.jsonl: there is no such file"),
        (
            ["--set", "evaluation.lm_eval={tasks: [hellaswag], include_path: nowhere}"],
            "nowhere: there is no such folder",
        ),
        (["--set", "data.test_preferences=own.jsonl"], "test_preferences is set, but preferences is not"),
        (["--set", "data.columns={output: reply}"], "reply"),
        (
            ["--set", "data.instructions=null", "--set", "documents.path=nowhere"],
            "documents.path nowhere does not exist",
        ),
        (["--set", "data.instructions=null", "--set", "documents.path=Makefile"], "Makefile is in no known format"),
        (["--set", "model.name_or_path=./nowhere"], "there is no such folder"),
        (["--set", "model.name_or_path=some/model"], "embedded:smollm2-135m-instruct"),
        (["--set", "compute.device=cuda"], "torch finds no CUDA card"),
        (["--resume", "last"], "There is no run of sft to resume"),
        (["--resume", "nothing-like-it"], "There is no run nothing-like-it"),
    ],
    ids=lambda value: "-".join(value[-1:]) if isinstance(value, list) else "",
)
def test_wrong_request(fresh_project, arguments, words):
    run = fresh_project.run("sft", *arguments)
    assert run.code == 2, run.stderr
    assert words in run.stderr
    assert run.stderr.startswith("Error: ")
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not (fresh_project.folder / "outputs" / "training").exists()


def test_empty_dataset(fresh_project):
    empty = fresh_project.folder / "empty.jsonl"
    empty.write_text("\n")
    run = fresh_project.run("sft", "--set", f"data.instructions={empty}")
    assert run.code == 2
    assert "is empty: there is no row in it" in run.stderr


def test_all_rows_dropped(fresh_project):
    run = fresh_project.run("sft", "--set", "formatting.max_length=8")
    assert run.code == 2
    assert "rows of the train split were set aside while formatting" in run.stderr
    assert "over_long_prompt" in run.stderr
    assert "Traceback" not in run.stderr


def test_data_that_is_not_fit_is_refused_or_marks_the_model(fresh_project):
    small = fresh_project.folder / "small.jsonl"
    rows = [
        {"instruction": f"Where does {i} stand?", "output": f"It stands after {i - 1}, as {i * 7} does."}
        for i in range(12)
    ]
    small.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = "{validation_fraction: 0.3, test_fraction: 0.3}"
    arguments = ["--set", f"data.instructions={small}", "--set", f"data.split={splits}"]
    arguments += ["--set", "data.rules.near_duplicate=off"]
    run = fresh_project.run("sft", *arguments, "--set", "data.train_unfit=false")
    assert run.code == 2, run.stderr
    assert (
        "The instruction rows are not fit to train on: only 12 rows are left, and at least 20 are needed" in run.stderr
    )
    assert "Traceback" not in run.stderr
    assert not (fresh_project.folder / "outputs" / "training").exists()
    assert (fresh_project.folder / "outputs" / "unfit_data" / "sft" / "report.html").exists()

    run = fresh_project.run("sft", *arguments)
    assert run.code == 0, run.stderr
    config = ("--config", str(fresh_project.recipe), "--json")
    newest = fresh_project.command("models", "list", *config).json["versions"][0]
    assert list(newest["unfit_data"]) == ["sft"]
    lineage = fresh_project.command("models", "lineage", str(newest["version"]), *config).json
    assert lineage["unfit_data"]["sft"].startswith("only 12 rows are left")


def test_rows_of_an_own_test_split_leave_training_or_are_refused(fresh_project):
    """By default, leaked rows are removed from training. With `data.strict`, the run is refused before training."""
    rows = fresh_project.folder / "instructions.jsonl"
    own = fresh_project.folder / "own.jsonl"
    unseen = json.dumps({"instruction": "Who painted it?", "output": "Nobody knows who painted that picture."})
    own.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]) + unseen + "\n")
    arguments = ["--set", f"data.test_instructions={own}", "--set", "generation.rejected_max_new_tokens=2"]
    run = fresh_project.run("datasets", *arguments)
    assert run.code == 0, run.stderr
    dataset = Path(run.json["artifacts"]["instruction_dataset"]["uri"])
    prepared = load_from_disk(str(next(dataset.rglob("dataset_dict.json")).parent))
    assert len(prepared["test"]) == 4
    assert [row["reason"] for row in prepared["quarantine"]].count("leaks_into_test") == 3
    assert len(prepared["train"]) + len(prepared["validation"]) == 57
    # Formatting uses this dataset, and counts the own test split separately.
    run = fresh_project.run("sft", *arguments, "--set", "sft.max_steps=1")
    assert run.code == 0, run.stderr
    report = json.loads(next(Path(run.json["artifacts"]["data_report"]["uri"]).rglob("report.json")).read_text())
    assert [report["stages"][f"instruction{part}"]["kept"] for part in ("", "_test")] == [57, 4]
    shutil.rmtree(fresh_project.folder / "outputs" / "training")
    strict = fresh_project.run("sft", *arguments, "--set", "data.strict=true")
    assert strict.code == 2
    assert "3 rows of the test split are also in the training data, and data.strict is on" in strict.stderr
    assert "Traceback" not in strict.stderr
    assert not (fresh_project.folder / "outputs" / "training").exists()


@pytest.mark.parametrize("variable", ["LLM_OUTPUT_DIR", "LLM_CACHE_DIR"])
def test_folder_that_cannot_be_written(fresh_project, variable):
    blocked = fresh_project.folder / "a-file"
    blocked.write_text("")
    fresh_project.env[variable] = str(blocked / "below")
    run = fresh_project.run("sft")
    assert run.code == 2
    assert "cannot be written to" in run.stderr
    assert variable in run.stderr


def test_dry_run_starts_nothing(tiny_model, tmp_path):
    project = make_project(tmp_path, tiny_model)
    run = project.command("run", "retrain", "--config", str(project.recipe), "--dry-run")
    assert run.code == 0
    assert "datasets instruction, preference → sft, dpo → evaluation and gate" in run.stdout
    assert "max_length: 192" in run.stdout
    assert not (project.folder / "zenml").exists()


def test_debug_shows_the_traceback(fresh_project):
    run = fresh_project.run("sft", "--debug", "--set", "sft.learning_rat=1")
    assert run.code == 2
    assert "Traceback" in run.stderr


def test_inspect_reports_on_a_file(fresh_project):
    file = fresh_project.folder / "instructions.jsonl"
    evaluation = fresh_project.folder / "evaluation.jsonl"
    rows = [
        {"instruction": "where does the number 7 STAND", "output": "Somewhere else."},
        {"instruction": "Who painted it?", "output": "Nobody knows."},
    ]
    evaluation.write_text("\n".join(map(json.dumps, rows)))
    run = fresh_project.command("inspect", str(file), "--against", str(evaluation), "--json")
    assert run.code == 0, run.stderr
    report = run.json
    assert (report["format"], report["rows"], report["quarantined"]["malformed"]) == ("alpaca", 63, 3)
    assert report["rows"] == report["kept"] + sum(report["quarantined"].values())
    assert report["leaked_into_test"] == 1
    assert report["fit_to_train"] is False
    assert "Not fit to train on: 1 row(s) of the evaluation file are also in the dataset." in run.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data in ../shared/data")
@pytest.mark.parametrize(
    ("name", "format_name", "rows"),
    [("alpaca_en_demo.json", "alpaca", 999), ("dpo_en_demo.json", "sharegpt-preference", 299)],
)
def test_inspect_real_data(fresh_project, name, format_name, rows):
    report = fresh_project.command("inspect", str(SHARED / name), "--json").json
    assert (report["format"], report["rows"]) == (format_name, rows)
    assert report["rows"] == report["kept"] + sum(report["quarantined"].values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data in ../shared/data")
def test_own_datasets_train(fresh_project):
    """`retrain` with the first rows of two real files, on the tiny model: Alpaca rows, and pairs with several turns."""
    steps = ["--set", "sft.max_steps=4", "--set", "dpo.max_steps=3", "--set", "formatting.max_length=512"]
    # A small split, because the held-out rows are evaluated four times for each of three models.
    steps += ["--set", "data.split={validation_fraction: 0.05, test_fraction: 0.05}"]
    for key, name in (("instructions", "alpaca_en_demo.json"), ("preferences", "dpo_en_demo.json")):
        part = fresh_project.folder / name
        part.write_text(json.dumps(json.loads((SHARED / name).read_text())[:150]))
        steps += ["--set", f"data.{key}={part}"]
    run = fresh_project.run("retrain", *steps)
    assert run.code == 0, run.stderr
    assert {"instruction_dataset", "preference_dataset", "dpo_adapter"} <= run.json["artifacts"].keys()
