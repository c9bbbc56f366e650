"""Real runs of the command line. Each runs in its own process, and each project has its own ZenML configuration."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.integration.preloaded import Forked
from tests.tiny_models import write_llama

ROOT = Path(__file__).resolve().parents[2]
# Metrics that differ between two runs of the same training. A resumed process counts only its own rows and their padding.
TIMED = {"tokens_per_second", "padding_share", "peak_memory_bytes", "train_runtime", "train_samples_per_second",
         "train_steps_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip
TIMEOUT_S = 600
# Value of all secrets in the tests. No output and no file may contain it.
PLANTED = "planted-secret-value"

# With this recipe, a model of two layers trains in seconds.
RECIPE = """
extends: {local}
name: tiny
model: {{name_or_path: {model}}}
data:
  instructions: {instructions}
  # Some tests make do with a few rows.
  train_unfit: true
  split: {{validation_fraction: 0.2, test_fraction: 0.2}}
formatting: {{max_length: 192}}
# This model never ends an answer, and writes no sentences.
generation: {{rejected_max_new_tokens: 8, rejected_cut: keep, max_preferences: 40}}
sft: {{num_train_epochs: 2, learning_rate: 1e-2, eval_steps: 4, save_steps: 4}}
dpo: {{num_train_epochs: 1, learning_rate: 1e-3, eval_steps: 4, save_steps: 4}}
evaluation: {{max_new_tokens: 8}}
promotion:
  sft: {{better_than: {{base: {{heldout_loss: 0.0}}}}}}
  dpo:
    better_than: {{base: {{heldout_loss: 0.0}}}}
    not_worse_than: {{sft: {{heldout_loss: 5.0}}}}
compute: {{device: cpu, dtype: float32}}
tracking: {{comet: "{comet}"}}
"""


@dataclass
class Run:
    """A finished command: its output, and its JSON if it has one."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])


@dataclass
class Project:
    """A user's project: its own ZenML configuration and outputs, and a recipe for the tiny model."""

    folder: Path
    recipe: Path
    env: dict[str, str] = field(repr=False)

    def start(self, *arguments: str) -> Forked:
        """Start `llm-engineering` with these arguments."""
        return Forked("tools.cli", arguments, self.env, ROOT)

    def command(self, *arguments: str) -> Run:
        return _ended(self.start(*arguments))

    def script(self, name: str, *arguments: str) -> Run:
        """Run a module of the tests, or a file, if the name ends with `.py`."""
        return _ended(Forked(name, arguments, self.env, ROOT))

    def run(self, pipeline: str, *arguments: str) -> Run:
        return self.command("run", pipeline, "--config", str(self.recipe), "--json", *arguments)


def _ended(process: Forked) -> Run:
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return Run(process.wait(), stdout, stderr)


def make_project(folder: Path, model: Path, template: "Project | None" = None, comet: str = "off") -> Project:
    """Create a project in `folder`. With `template`, it gets a copy of that project's ZenML configuration and store.

    Comet is off, because it waits a second at the end of each training.
    """
    instructions = folder / "instructions.jsonl"
    with instructions.open("w") as file:
        for i in range(60):
            answer = f"The number {i} comes after {i - 1}, and {i + 1} comes after it."
            file.write(json.dumps({"instruction": f"Where does the number {i} stand?", "output": answer}) + "\n")
            if i in (10, 20, 30):
                file.write('{"instruction": "broken\n')
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            local=ROOT / "configs" / "python_reference.yaml", model=model, instructions=instructions, comet=comet
        )
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("ZENML_")}
    env |= {
        "ZENML_CONFIG_PATH": str(folder / "zenml"),
        "ZENML_LOCAL_STORES_PATH": str(folder / "stores"),
        "LLM_OUTPUT_DIR": str(folder / "outputs"),
        "HF_HUB_OFFLINE": "1",
        "COMET_API_KEY": "",
        **dict.fromkeys(("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"), PLANTED),
    }
    if template is not None:
        for name in ("zenml", "stores"):
            shutil.copytree(template.folder / name, folder / name)
        config = folder / "zenml" / "config.yaml"
        config.write_text(config.read_text().replace(str(template.folder), str(folder)))
        # The copy is up to date. ZenML would read all its migrations in each command, to find this out.
        env["DISABLE_DATABASE_MIGRATION"] = "true"
    return Project(folder, recipe, env)


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """The `tiny_model` of the unit tests with the 4,096 most frequent tokens of its tokenizer.

    Texts of the tests have as many tokens within a few per cent, and the output layer takes a twelfth of the time.
    """
    folder = tmp_path_factory.mktemp("cut-tokenizer")
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    cut = stored["model"]
    cut["vocab"] = {token: number for token, number in cut["vocab"].items() if number < 4096}
    cut["merges"] = [pair for pair in cut["merges"] if "".join(pair) in cut["vocab"]]
    file.write_text(json.dumps(stored))
    return write_llama(tmp_path_factory.mktemp("tiny-model"), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="session")
def child_python(job_python) -> dict[str, str]:
    """The variable of a command whose child processes in Python are to have imported the libraries, as it has itself.

    They are no children of the command then, and outlive it if it is killed: a test that kills it must not use this.
    """
    return {"CHILD_PYTHON": f"{job_python.partition(':')[0]}/python"} if sys.platform == "linux" else {}


@pytest.fixture(scope="session")
def unused(tiny_model, tmp_path_factory) -> Project:
    """A project without a run, to be copied. ZenML needs seconds to create a store, and a copy takes no time.

    Two first commands at once make one store.
    """
    project = make_project(tmp_path_factory.mktemp("unused"), tiny_model)
    for process in [project.start("runs") for _ in range(2)]:
        listed = _ended(process)
        assert listed.code == 0, listed.stderr
    return project


@pytest.fixture(scope="session")
def project(tiny_model, tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"), tiny_model, comet="offline")


@pytest.fixture
def fresh_project(tiny_model, unused, tmp_path) -> Project:
    return make_project(tmp_path, tiny_model, unused)


@dataclass
class FinishedRun:
    """A finished run of `sft`, for tests of the commands that show runs."""

    env: dict[str, str]
    run_id: str
    pipeline: str
    result: Run


@pytest.fixture(scope="session")
def finished_run(project) -> FinishedRun:
    run = project.run("sft")
    assert run.code == 0, run.stderr
    return FinishedRun(project.env, run.json["run_id"], "sft", run)
