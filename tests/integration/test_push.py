"""Publishing datasets from the command line to a hub on loopback, and loading them as any user does."""

import io
import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from tests.fakes.hub import running_hub
from tests.integration.conftest import make_project

TOKEN = "hf_planted_token_value"

LOAD = """
import json, sys
from datasets import load_dataset
from huggingface_hub import DatasetCard
loaded = load_dataset(sys.argv[1])
rows = {name: part.to_list() for name, part in loaded.items()}
print(json.dumps({"rows": rows, "license": DatasetCard.load(sys.argv[1]).data.license}))
"""
STORED = """
import json, sys
from tools.cli import prepare_zenml
prepare_zenml()
from zenml.client import Client
import steps.materializers
dataset = Client().get_artifact_version(sys.argv[1]).load()
print(json.dumps({name: dataset[name].to_list() for name in ("train", "validation", "test")}))
"""


@pytest.fixture(scope="module")
def made(tiny_model, unused, tmp_path_factory):
    """A project with both datasets, whose recipe names a licence and two repositories."""
    project = make_project(tmp_path_factory.mktemp("push"), tiny_model, unused)
    hub = "{license: cc-by-4.0, instruction_repo_id: someone/rows, preference_repo_id: someone/pairs}"
    text = project.recipe.read_text().replace("data:\n", f"data:\n  hub: {hub}\n")
    project.recipe.write_text(text)
    run = project.run("datasets")
    assert run.code == 0, run.stderr
    return project


@pytest.fixture
def hub():
    with running_hub(TOKEN) as served:
        yield served


@pytest.fixture
def online(made, hub, tmp_path):
    """The project with an environment in which it reaches the hub."""
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return replace(made, env=made.env | env)


def push(project, kind, *arguments):
    return project.command("push-dataset", kind, "--config", str(project.recipe), *arguments)


def test_published_rows_are_the_stored_rows(made, online, hub, tiny_model):
    run = push(online, "preference")
    assert run.code == 0, run.stderr
    assert run.stdout.strip() == f"{hub.url}/datasets/someone/pairs"
    assert "Publishing:  someone/pairs, private" in run.stderr
    assert hub.sent("POST", "/api/repos/create")[0]["visibility"] == "private"
    repo = hub.repos["someone/pairs"]
    files = ["README.md", "data/test.parquet", "data/train.parquet", "data/validation.parquet"]
    assert repo.commits == [{"written": files, "removed": []}]

    script = made.folder / "load.py"
    script.write_text(LOAD)
    done = online.script(str(script), "someone/pairs")
    assert done.code == 0, done.stderr
    loaded = done.json
    assert loaded["license"] == "cc-by-4.0"
    script.write_text(STORED)
    stored = made.script(str(script), "preference_dataset").json
    # The model was a folder of this machine. Its name is published, its path is not.
    hidden = json.loads(json.dumps(stored).replace(str(tiny_model), tiny_model.name))
    assert loaded["rows"] == hidden
    assert hidden != stored

    card = repo.files["README.md"].decode()
    counted = sum(map(len, stored.values()))
    assert f"{counted:,} rows for preference optimisation (DPO)" in card
    assert f"| generating model | {tiny_model.name}@folder-" in card
    assert "| documents | instructions.jsonl |" in card
    assert not any(str(place) in card + json.dumps(loaded["rows"]) for place in (made.folder, tiny_model))


def test_own_rows_are_published_without_anything_else(made, online, hub):
    """Malformed lines are counted but not shown. The token is sent in its header only, and stored nowhere."""
    run = push(online, "instruction", "--repo", "other/name", "--public")
    assert run.code == 0, run.stderr
    assert "other/name, PUBLIC" in run.stderr
    assert hub.sent("POST", "/api/repos/create")[0]["visibility"] == "public"
    files = hub.repos["other/name"].files
    card = files["README.md"].decode()
    assert "| generating model | none: own dataset |" in card
    assert "| instruction | 63 | 60 | 3 malformed |" in card
    tables = {name: pq.read_table(io.BytesIO(files[name])).to_pylist() for name in files if name != "README.md"}
    assert tables.keys() == {"data/train.parquet", "data/validation.parquet", "data/test.parquet"}
    assert sum(map(len, tables.values())) == 60
    assert "broken" not in json.dumps(tables) + card

    assert TOKEN not in run.stdout + run.stderr
    headers = [(name.lower(), r.path) for r in hub.requests for name, value in r.headers.items() if TOKEN in value]
    assert headers
    assert {name for name, _ in headers} == {"authorization"}
    assert not any(path.startswith("/lfs/") for _, path in headers)
    assert not any(TOKEN in request.path or TOKEN.encode() in request.body for request in hub.requests)
    for file in made.folder.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["instruction", "--set", "data.hub=null"], "names no licence for publishing the data"),
        (["instruction", "--set", "data.hub.instruction_repo_id=null"], "data.hub.instruction_repo_id"),
        (["instruction", "--repo", "no-owner"], "does not name an owner"),
        (["instruction", "--set", "data.hub.licence=mit"], "Did you mean `data.hub.license`?"),
        (["instruction", "--set", "name=nobody"], "nobody has no instruction dataset yet"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_request(online, hub, arguments, words):
    run = push(online, *arguments)
    assert run.code == 2, run.stderr
    assert words in run.stderr
    assert "Traceback" not in run.stderr
    assert hub.requests == []


def test_credentials_are_published_only_with_allow_secrets(made, online, hub, tmp_path):
    secret = "ghp_" + "a1B2c3D4e5F6" * 3
    rows = tmp_path / "rows.jsonl"
    planted = json.dumps({"instruction": "How do I sign in?", "output": f"Give {secret} as the password, and go on."})
    rows.write_text((made.folder / "instructions.jsonl").read_text() + planted + "\n")
    own = ["--set", "name=secretive", "--set", f"data.instructions={rows}"]
    run = made.run("datasets", *own)
    assert run.code == 0, run.stderr
    refused = push(online, "instruction", *own)
    assert refused.code == 2
    assert "Credentials were found in 1 places and not masked (the first: rows.jsonl:line 64)" in refused.stderr
    assert secret not in refused.stdout + refused.stderr
    assert hub.requests == []
    insisted = push(online, "instruction", *own, "--allow-secrets")
    assert insisted.code == 0, insisted.stderr
    masked = made.run("datasets", *own, "--set", "data.rules.secret=mask")
    assert masked.code == 0, masked.stderr
    published = push(online, "instruction", *own, "--set", "data.rules.secret=mask")
    assert published.code == 0, published.stderr
    text = json.dumps(
        [
            pq.read_table(io.BytesIO(f)).to_pylist()
            for name, f in hub.repos["someone/rows"].files.items()
            if "data" in name
        ]
    )
    assert "Give [SECRET] as the password" in text
    assert secret not in text
