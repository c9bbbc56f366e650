"""Which steps become jobs, and how a job finds the base model."""

from types import SimpleNamespace

import pytest

from llm_engineering.recipe.generation_blocks import ClientConfig
from steps import in_job, job_scope


def write(client: ClientConfig | None, seed: int) -> str:
    return f"here with seed {seed}"


@pytest.mark.parametrize(
    ("scope", "client", "place"),
    [
        ("chain", ClientConfig(client="local"), "job"),
        ("chain", None, "job"),
        ("chain", ClientConfig(client="openai", model="m"), "here with seed 3"),
        ("training", ClientConfig(client="local"), "here with seed 3"),
        (None, ClientConfig(client="local"), "here with seed 3"),
    ],
)
def test_only_steps_with_a_model_of_their_own_are_jobs(monkeypatch, scope, client, place):
    compute = {"target": "sagemaker", "sagemaker": {"instance_type": "ml.g5.xlarge", "scope": scope}} if scope else {}
    run = SimpleNamespace(config=SimpleNamespace(parameters={"recipe": {"compute": compute}}))
    monkeypatch.setattr(job_scope, "get_step_context", lambda: SimpleNamespace(pipeline_run=run))
    monkeypatch.setattr(job_scope.Recipe, "model_validate", lambda recipe: recipe)
    monkeypatch.setattr(in_job, "dispatched", lambda function, recipe, arguments: "job")
    assert job_scope.sent_to_job(write)(client, seed=3) == place


def test_the_base_model_has_its_path_in_the_job(tmp_path):
    folder, place = tmp_path / "input" / "model", tmp_path / "home" / "models" / "llama"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    in_job.link_model(place, folder)
    assert (place / "config.json").read_text() == "{}"
    # An existing folder is not replaced.
    in_job.link_model(folder, tmp_path / "other")
    assert (folder / "config.json").is_file()
