"""Steps of a project whose code changes between its runs."""

import shutil

from tests.integration.conftest import ROOT, TIMEOUT_S
from tests.integration.preloaded import Forked

# The project of this file has packages of the same names as those that the fork server has imported.
SCRIPT = """
import sys

for name in [name for name in sys.modules if name.partition(".")[0] in ("llm_engineering", "pipelines", "steps")]:
    del sys.modules[name]

from steps import of_test as steps
from zenml import pipeline
from zenml.client import Client

@pipeline
def cached():
    steps.bare()
    steps.ours()

run = cached()
found = {name: str(step.status) for name, step in Client().get_pipeline_run(run.id).steps.items()}
print("STATES", found["bare"], found["ours"], flush=True)
"""

STEPS = """
from zenml import step
from llm_engineering.helper_of_test import helper
from steps.caching import project_step

@step
def bare() -> int:
    return helper()

@project_step()
def ours() -> int:
    return helper()
"""


def test_zenml_serves_stale_results_of_plain_steps_but_not_of_project_steps(fresh_project):
    """After a change of a helper, ZenML reruns a project step, and serves a plain step's old result from the cache."""
    project = fresh_project.folder / "project"
    for package in ("steps", "llm_engineering"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").write_text("")
    shutil.copy(ROOT / "steps" / "caching.py", project / "steps" / "caching.py")
    (project / "steps" / "of_test.py").write_text(STEPS)
    (project / "run_of_test.py").write_text(SCRIPT)
    states = []
    for value in (1, 1, 2):
        (project / "llm_engineering" / "helper_of_test.py").write_text(f"def helper() -> int:\n    return {value}\n")
        process = Forked("run_of_test.py", (), fresh_project.env, project)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.wait() == 0, stderr
        states += [line.split()[1:] for line in stdout.splitlines() if line.startswith("STATES")]
    assert states == [["completed", "completed"], ["cached", "cached"], ["cached", "completed"]]
