"""Real runs of the command line, each in a process of its own, with a ZenML configuration of their own."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.preloaded import run_module

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600

# Small enough for a model of two layers to train in seconds.
RECIPE = """
extends: {local}
name: tiny
model: {{name_or_path: {model}}}
data:
  instructions: {instructions}
  split: {{validation_fraction: 0.2, test_fraction: 0.2}}
formatting: {{max_length: 192}}
generation: {{rejected_max_new_tokens: 8, max_preferences: 40}}
sft: {{num_train_epochs: 2, learning_rate: 1e-2, eval_steps: 4, save_steps: 4}}
dpo: {{num_train_epochs: 1, learning_rate: 1e-3, eval_steps: 4, save_steps: 4}}
evaluation: {{max_new_tokens: 8}}
promotion:
  sft: {{better_than: {{base: {{heldout_loss: 0.0}}}}}}
  dpo:
    better_than: {{base: {{heldout_loss: 0.0}}}}
    not_worse_than: {{sft: {{heldout_loss: 5.0}}}}
compute: {{device: cpu, dtype: float32}}
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
    """A user's place: own ZenML configuration, own outputs, a recipe on the tiny model."""

    folder: Path
    recipe: Path
    env: dict[str, str] = field(repr=False)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def command(self, *arguments: str) -> Run:
        # Read by huggingface_hub when it is imported, which was done with this process's.
        if any(
            self.env.get(name) != os.environ.get(name) for name in {*self.env, *os.environ} if name.startswith("HF_")
        ):
            process = self.start(*arguments)
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
            return Run(process.returncode, stdout, stderr)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder)
            code = run_module(arguments[0], arguments[1:], self.env, ROOT, output, TIMEOUT_S)
            return Run(code, (output / "stdout").read_text(), (output / "stderr").read_text())

    def run(self, pipeline: str, *arguments: str) -> Run:
        return self.command("tools.run", pipeline, "--config", str(self.recipe), "--json", *arguments)


def make_project(folder: Path, model: Path) -> Project:
    """A place of its own below `folder`."""
    instructions = folder / "instructions.jsonl"
    with instructions.open("w") as file:
        for i in range(60):
            answer = f"The number {i} comes after {i - 1}, and {i + 1} comes after it."
            file.write(json.dumps({"instruction": f"Where does the number {i} stand?", "output": answer}) + "\n")
            if i in (10, 20, 30):
                file.write('{"instruction": "broken\n')
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(local=ROOT / "configs" / "local.yaml", model=model, instructions=instructions))
    secrets = ("COMET_API_KEY", "HF_TOKEN", "OPENAI_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in secrets and not name.startswith("ZENML_")}
    env |= {
        "ZENML_CONFIG_PATH": str(folder / "zenml"),
        "ZENML_LOCAL_STORES_PATH": str(folder / "stores"),
        "LLM_OUTPUT_DIR": str(folder / "outputs"),
        "HF_HUB_OFFLINE": "1",
        "COMET_API_KEY": "",
    }
    return Project(folder, recipe, env)


@pytest.fixture(scope="session")
def project(tiny_model, tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"), tiny_model)


@pytest.fixture
def fresh_project(tiny_model, tmp_path) -> Project:
    return make_project(tmp_path, tiny_model)


@dataclass
class FinishedRun:
    """A run of `sft` that is done, for what shows runs."""

    env: dict[str, str]
    run_id: str
    pipeline: str
    result: Run


@pytest.fixture(scope="session")
def finished_run(project) -> FinishedRun:
    run = project.run("sft")
    assert run.code == 0, run.stderr
    return FinishedRun(project.env, run.json["run_id"], "sft", run)
