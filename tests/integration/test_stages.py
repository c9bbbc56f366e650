"""Chains of stages as users run them: cpt, sft and dpo, and a stage that is not in the project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings
from tests.integration.conftest import ROOT, Project, Run, make_project
from tests.tiny_models import formatted
from tools.make import GIVEN
from tools.make import command as command_of

# The tokenizer of the model has 300 tokens, so the rows are long and everything else is fast.
RECIPE = """
extends: {recipe}
chain: [cpt, sft, dpo]
model: {{name_or_path: {model}}}
documents: {{path: {documents}}}
data: {{replay: {{path: {replay}, share: 0.2}}}}
formatting: {{chat_template: chatml, max_length: 384}}
generation: {{max_preferences: 24, rejected_max_new_tokens: 2}}
cpt:
  learning_rate: 1e-2
  num_train_epochs: 1
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 2
  eval_steps: 20
  save_steps: 20
sft: {{num_train_epochs: 3, gradient_accumulation_steps: 1, eval_steps: 20, save_steps: 20}}
dpo: {{eval_steps: 20, save_steps: 20}}
evaluation: {{generated_rows: 2, sample_answers: 2, max_new_tokens: 2, bootstrap_samples: 100}}
promotion:
  cpt: {{better_than: {{base: {{document_loss: 0.0}}, incumbent: {{document_loss: 0.0}}}}}}
"""
# Reads the steps of each run in the order of their start, and the versions of the adapters with their files' hashes.
READ = """
import hashlib, json, sys
import tools.cli
tools.cli.prepare_zenml()
from zenml.client import Client
runs = []
for run in Client().list_pipeline_runs(size=100, sort_by="asc:created", hydrate=True).items:
    steps = sorted(run.steps.values(), key=lambda step: step.start_time)
    adapters = {}
    for step in steps:
        for name, (version,) in step.outputs.items():
            if name.endswith("_adapter"):
                files = sorted(version.load().path.glob("*.safetensors"))
                adapters[name] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    states = {step.name: str(step.status) for step in steps}
    runs.append({"pipeline": run.pipeline.name, "steps": states, "adapters": adapters})
print(json.dumps(runs))
"""


def number_project(folder: Path, model: Path, template: Project) -> Project:
    """A project with documents, a general dataset, and a recipe with three stages."""
    project = make_project(folder, model, template)
    documents = folder / "documents"
    documents.mkdir()
    for i in range(24):
        # The names decide the splits: 15 files for training, 5 for validation, 4 for the test.
        text = " ".join(f"The number {n} of file {i} comes after {n - 1}." for n in range(i, i + 12))
        (documents / f"{i:02}.txt").write_text(text)
    replay = folder / "general.jsonl"
    replay.write_text("".join(json.dumps({"text": f"Rain fell on day {i} in the hills."}) + "\n" for i in range(400)))
    # No line of this file is quarantined: the empty quarantine must be stored and read too.
    instructions = folder / "instructions.jsonl"
    lines = instructions.read_text().splitlines(keepends=True)
    instructions.write_text("".join(line for line in lines if line.endswith("}\n")))
    recipe = folder / "stages.yaml"
    recipe.write_text(RECIPE.format(recipe=project.recipe, model=model, documents=documents, replay=replay))
    project.recipe = recipe
    project.env["OMP_NUM_THREADS"] = "1"
    return project


def runs_of(project: Project) -> list[dict]:
    script = project.folder / "read.py"
    script.write_text(READ)
    done = project.script(str(script))
    assert done.code == 0, done.stderr
    return done.json


def make(project: Project, target: str, **variables: object) -> Run:
    """Run the command that make starts for a target and its variables."""
    environment = {name: str(value) for name, value in variables.items()}
    return project.command(*command_of(target, environment | {GIVEN: " ".join(variables)}))


def trained(run: dict) -> list[str]:
    """The training steps that a run did not take from the cache."""
    return [name for name, state in run["steps"].items() if name.startswith("train_") and state == "completed"]


@pytest.fixture(scope="module")
def chained(small_llama, unused, tmp_path_factory) -> Project:
    """A project after `run dpo`, the same command again by make, `run dpo` with another dpo block, and `run retrain`."""
    project = number_project(tmp_path_factory.mktemp("stages"), small_llama, unused)
    project.done = {
        "first": project.run("dpo"),
        "again": make(project, "run", STAGE="dpo", CONFIG=project.recipe, ARGS="--json"),
        "changed": project.run("dpo", "--set", "dpo.beta=0.2"),
        # Training again replaces each adapter by one that is made from the beginning.
        "retrain": project.run("retrain", "--no-cache"),
    }
    for run in project.done.values():
        assert run.code == 0, run.stderr
    project.runs = runs_of(project)
    return project


def test_the_last_stage_runs_the_stages_before_it_and_registers_each(chained):
    first = chained.done["first"].stderr
    assert "No cpt model is registered: training it first" in first
    assert "malformed" not in first
    assert [run["pipeline"] for run in chained.runs[:2]] == ["sft", "dpo"]
    # A stage on texts is trained in the run of the stage after it
    assert [trained(run) for run in chained.runs[:2]] == [["train_cpt", "train_sft"], ["train_dpo"]]
    assert [set(run["adapters"]) for run in chained.runs[:2]] == [{"cpt_adapter", "sft_adapter"}, {"dpo_adapter"}]
    metrics = chained.done["first"].json["metrics"]
    measured = {f"{kind}_loss_{name}" for kind in ("document", "heldout") for name in ("base", "cpt", "sft", "dpo")}
    assert measured <= metrics.keys()
    assert metrics["document_loss_cpt"] < metrics["document_loss_base"]
    assert metrics["heldout_loss_sft"] < metrics["heldout_loss_cpt"]


def test_the_same_command_by_make_comes_from_the_cache(chained):
    again = chained.runs[2]
    assert again["pipeline"] == "dpo"
    assert [name for name, state in again["steps"].items() if state != "cached"] == ["promote"]
    assert chained.done["again"].json["metrics"] == chained.done["first"].json["metrics"]


def test_make_run_without_a_stage_names_the_stages(chained):
    run = make(chained, "run")
    assert run.code == 2
    assert run.stderr.startswith("Error: ")
    assert "'cpt', 'sft', 'dpo'" in run.stderr


def test_a_change_of_the_last_block_trains_only_the_last_stage(chained):
    changed = chained.runs[3]
    assert changed["pipeline"] == "dpo"
    assert trained(changed) == ["train_dpo"]
    assert changed["adapters"]["dpo_adapter"] != chained.runs[1]["adapters"]["dpo_adapter"]


def test_retrain_gives_the_adapters_of_the_single_runs(chained):
    assert len(chained.runs) == 5
    retrained = chained.runs[4]
    assert retrained["pipeline"] == "retrain"
    assert trained(retrained) == ["train_cpt", "train_sft", "train_dpo"]
    assert {"cpt_adapter", "sft_adapter", "dpo_adapter"} <= chained.done["retrain"].json["artifacts"].keys()
    single = {name: digests for run in chained.runs[:2] for name, digests in run["adapters"].items()}
    assert retrained["adapters"] == single
    assert all(digests for digests in single.values())


def test_the_lineage_of_a_cpt_version_leads_back_to_documents_and_replay(chained):
    shown = chained.command("models", "lineage", "1", "--config", str(chained.recipe), "--json")
    assert shown.code == 0, shown.stderr
    names = {artifact["name"]: artifact for artifact in shown.json["artifacts"]}
    assert names["cpt_adapter"]["from"] == ["formatted_cpt v1"]
    assert names["formatted_cpt"]["from"] == ["text_dataset v1"]
    assert names["text_dataset"]["from"] == ["text_candidates v1"]
    assert names["text_candidates"]["from"] == ["documents v1"]
    sources = shown.json["sources"]
    assert list(sources["text_candidates v1"]) == [str(chained.folder / "general.jsonl")]
    assert len(sources["documents v1"]) == 24


def test_verify_of_a_cpt_version_names_a_changed_general_dataset(chained):
    general = chained.folder / "general.jsonl"
    before = general.read_bytes()
    command = ("models", "verify", "1", "--config", str(chained.recipe), "--json")
    general.write_bytes(before + b"\n")
    changed = chained.command(*command)
    general.write_bytes(before)
    found = [(f["where"], Path(f["file"]).name, f["what"]) for f in changed.json["found"]]
    assert found == [("sources of text_candidates v1", "general.jsonl", "changed")]
    unchanged = chained.command(*command)
    assert unchanged.code == 0, unchanged.stdout + unchanged.stderr


COMMAND = """
extends: {recipe}
chain: [cpt]
cpt: {{packing: false, num_train_epochs: 1, logging_steps: 1}}
data: {{replay: null}}
"""


def test_cpt_trains_in_two_processes_without_zenml(small_llama, unused, tmp_path):
    """Two processes with a row each make the steps of one process with two rows."""
    project = number_project(tmp_path, small_llama, unused)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(small_llama)), Settings(), "chatml")
    formatted("text", 8, tokenizer, tmp_path).save_to_disk(tmp_path / "data")
    recipe = tmp_path / "command.yaml"
    recipe.write_text(COMMAND.format(recipe=project.recipe))
    outcomes = []
    for count in (1, 2):
        output = tmp_path / f"out-{count}"
        done = project.script(
            "llm_engineering.training", "cpt", "--recipe", str(recipe), "--data", str(tmp_path / "data"),
            "--output", str(output), "--set", f"compute.num_processes={count}",
            "--set", f"cpt.gradient_accumulation_steps={2 // count}",
        )  # fmt: skip
        assert done.code == 0, done.stderr
        summary = json.loads((output / "report" / "report.json").read_text())
        assert (summary["stage"], summary["num_processes"], summary["effective_batch"]) == ("cpt", count, 2)
        losses = [entry["loss"] for entry in summary["history"] if "loss" in entry]
        outcomes.append((losses, load_file(output / "adapter" / "adapter_model.safetensors")))
    (losses, weights), (other_losses, other_weights) = outcomes
    assert len(losses) == 4
    assert other_losses == pytest.approx(losses, abs=1e-5)
    assert_close(other_weights, weights, rtol=1e-3, atol=1e-4)

    wrong = project.script(
        "llm_engineering.training", "sft", "--recipe", str(recipe), "--data", str(tmp_path / "data"), "--output", "out"
    )
    assert wrong.code == 2
    assert "The recipe's chain is cpt, without sft. Add it, or name another stage." in wrong.stderr


TOY = """
extends: {recipe}
chain: [sft, toy]
data: {{replay: null}}
toy:
  learning_rate: 5e-3
  num_train_epochs: 3
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 1
  eval_steps: 20
  save_steps: 20
promotion:
  toy: {{better_than: {{base: {{heldout_loss: 0.0}}, sft: {{heldout_loss: 0.0}}, incumbent: {{heldout_loss: 0.0}}}}}}
"""


def test_a_stage_is_a_file_and_a_row_of_the_table(small_llama, unused, tmp_path):
    """The toy stage trains, is evaluated, passes the gate, and is listed and followed back like the other stages."""
    project = number_project(tmp_path, small_llama, unused)
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(TOY.format(recipe=project.recipe))
    # In a new process, because the fork server has already read the table of stages.
    script = str(Path(__file__).with_name("toy_stage.py"))
    options = ["--config", str(recipe), "--json"]
    commands = [json.dumps([*words, *options]) for words in (["run", "toy"], ["models", "lineage", "2"])]
    done = subprocess.run(
        [sys.executable, script, *commands], cwd=ROOT, env=project.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "No sft model is registered: training it first" in done.stderr
    assert "Every rule passed, so the model is promoted to staging." in done.stderr
    result, lineage = map(json.loads, done.stdout.splitlines())
    assert result["pipeline"] == "toy"
    assert {"toy_adapter", "formatted_toy", "evaluation_report", "promotion_decision"} <= result["artifacts"].keys()
    assert result["metrics"]["heldout_loss_toy"] < result["metrics"]["heldout_loss_sft"]
    names = {artifact["name"]: artifact for artifact in lineage["artifacts"]}
    assert names["toy_adapter"]["from"] == ["formatted_toy v1", "sft_adapter v1"]
    assert lineage["stage"] == "staging"
