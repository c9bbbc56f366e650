"""A run of the command line with ZenML's artifacts in S3, over HTTP on loopback."""

import pytest

from tests.fakes.sagemaker import BUCKET, running_sagemaker

pytest.importorskip("s3fs", reason="ZenML's artifact store in S3 needs the extra aws")

LOAD = """
import tools.cli, json
tools.cli.prepare_zenml()
from zenml.client import Client
import steps.materializers
from steps.materializers import file_hashes
client = Client()
run = client.list_pipeline_runs(sort_by="desc:created").items[0]
found = {}
for name in run.steps:
    for outputs in run.steps[name].outputs.values():
        for artifact in outputs:
            value = artifact.load()
            path = getattr(value, "path", None)
            found[artifact.artifact.name] = sorted(f.name for f in path.rglob("*")) if path else type(value).__name__
            found[artifact.artifact.name + " rows"] = {k: len(v) for k, v in value.items()} if hasattr(value, "num_rows") else 0
            found[artifact.artifact.name + " at"] = artifact.uri
print(json.dumps(found))
"""


def test_a_run_keeps_its_artifacts_in_s3_and_loads_them_back(fresh_project, tmp_path):
    with running_sagemaker() as fake:
        fresh_project.env |= fake.env() | {"AWS_DEFAULT_REGION": "eu-west-1"}
        for _ in range(2):  # the second time the stack exists already
            made = fresh_project.command("cloud", "stack")
            assert made.code == 0, made.stderr
        assert f"s3://{BUCKET}/llm-engineering/artifacts" in made.stdout
        run = fresh_project.run("sft")
        assert run.code == 0, run.stderr
        again = fresh_project.run("sft")
        made = [name for name in run.json["artifacts"] if again.json["artifacts"][name] != run.json["artifacts"][name]]
        assert sorted(made) == [
            "evaluation_page",
            "promotion_decision",
        ]  # the gate judges every run; everything else comes from the cache
        for artifact in run.json["artifacts"].values():
            assert artifact["uri"].startswith(f"s3://{BUCKET}/llm-engineering/artifacts/")
        script = tmp_path / "load_artifacts.py"
        script.write_text(LOAD)
        loaded = fresh_project.script(str(script))
        assert loaded.code == 0, loaded.stderr
        found = loaded.json
        assert "adapter_model.safetensors" in found["sft_adapter"]
        assert "report.json" in found["data_report"]
        assert found["instruction_dataset rows"]["train"] > 0
        key, secret = fake.credentials("launcher")
    # ZenML's database and configuration hold no credentials.
    files = [path for path in fresh_project.folder.rglob("*") if path.is_file()]
    assert any(path.name == "zenml.db" for path in files)
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content, path
        assert key.encode() not in content, path
    off = fresh_project.command("cloud", "stack", "--off")
    assert off.code == 0, off.stderr


def test_a_missing_bucket_is_named(fresh_project):
    fresh_project.env["SAGEMAKER_BUCKET"] = ""
    run = fresh_project.command("cloud", "stack")
    assert (run.code, "set SAGEMAKER_BUCKET in .env" in run.stderr) == (2, True)
