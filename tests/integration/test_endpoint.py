"""Generation over real HTTP: a faulty endpoint, a kill in the middle, `transformers serve`, and Bedrock's protocol."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from llm_engineering.models.base_model import model_path
from llm_engineering.models.revision import pin_revision
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.recipe.settings import Settings
from tests.conftest import free_port
from tests.fakes.scripted_endpoint import ScriptedEndpoint, error, scripted
from tests.integration.conftest import ROOT
from tests.integration.preloaded import Forked

PASSAGES = 800
CONCURRENCY = 64
# Longer than any answer takes on a busy machine: a time-out is then the script's, and nothing that was answered.
TIMEOUT_S, HANG_S = 3.0, 3.3

GENERATE = """
import json, sys
from pathlib import Path
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.instructions import generate_instructions
from llm_engineering.generation.clients.open import open_client
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, GenerationConfig, InstructionWriting
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.model_blocks import ModelConfig
generation, count, folder = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
config = GenerationConfig.model_validate(generation)
names = ["".join(chr(97 + int(digit)) for digit in f"{i:05d}") for i in range(count)]
passages = [
    Passage(id=n, document="lamps", title="lamps", start=i, end=i, text=f"The lamp {n} stands by the harbour wall.")
    for i, n in enumerate(names)
]
client = open_client(config.part(ClientConfig), ModelConfig(), ComputeConfig(), Settings(llm_output_dir=folder))
rows, rejected = generate_instructions(passages, client, config.part(InstructionWriting), seed=1)
result = {"rows": [row.record() for row in rows], "rejected": [row.model_dump() for row in rejected]}
(folder / "dataset.json").write_text(json.dumps(result))
"""


def generate(url, folder, count=PASSAGES, **generation):
    """A process that generates instructions for `count` passages into a folder, which need not be there."""
    config = {"client": "openai", "model": "m", "base_url": f"{url}/v1", "question_max_new_tokens": 100}
    config |= {"concurrency": CONCURRENCY, "timeout_s": TIMEOUT_S} | generation
    folder.mkdir(exist_ok=True)
    script = folder / "generate.py"
    script.write_text(GENERATE)
    return Forked(str(script), [json.dumps(config), str(count), str(folder)], os.environ, ROOT)


def dataset(process, folder):
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return json.loads((folder / "dataset.json").read_text())


def test_faulty_endpoint_loses_nothing_and_a_kill_changes_nothing(tmp_path):
    with ScriptedEndpoint(scripted(seed=1, faults=0.3, latency_s=(0.01, 0.03), hang_s=HANG_S)) as endpoint:
        whole = tmp_path / "whole"
        expected = dataset(generate(endpoint.url, whole), whole)
        rows, rejected = expected["rows"], expected["rejected"]
        assert len(rows) + len(rejected) == PASSAGES
        assert {row["reason"] for row in rejected} == {"bad_json", "wrong_schema"}
        # One in ten first answers is bad, and three in ten of those stay bad after the repair.
        assert 0.01 * PASSAGES < len(rejected) < 0.06 * PASSAGES
        assert all(row["text"] for row in rejected)
        faulty = sum(endpoint.statuses.values()) - endpoint.statuses["200"]
        assert faulty > 0.15 * PASSAGES
        assert {"200", "429", "500", "dropped"} == endpoint.statuses.keys()
        # Nothing is asked again after it was answered, and no more at once than allowed.
        assert set(endpoint.answered.values()) == {1}
        assert endpoint.most_at_once <= CONCURRENCY

        endpoint.reset()
        killed = tmp_path / "killed"
        process = generate(endpoint.url, killed)
        store = killed / "answers.jsonl"
        deadline = time.monotonic() + 120
        while not store.exists() or store.read_bytes().count(b"\n") < 0.4 * PASSAGES:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = [json.loads(line)["answer"] for line in store.read_bytes().split(b"\n") if line.endswith(b"}")]
        assert 0.3 * PASSAGES < len(kept) < 0.95 * PASSAGES

        assert dataset(generate(endpoint.url, killed), killed) == expected
        # What was received is paid once; asked for again is only what was on its way when the process died.
        assert {endpoint.answered[text] for text in kept} == {1}
        assert sum(count > 1 for count in endpoint.answered.values()) <= CONCURRENCY

        endpoint.reset()
        assert dataset(generate(endpoint.url, killed), killed) == expected
        assert not endpoint.asked


def test_endpoint_that_goes_away_ends_the_run_and_keeps_what_it_gave(tmp_path):
    def gone_after_a_while(asked):
        if len(endpoint.answered) >= 50:
            return error(503, "gone")
        return script(asked)

    script = scripted(seed=1, faults=0.0, latency_s=(0.0, 0.01), hang_s=HANG_S)
    with ScriptedEndpoint(gone_after_a_while) as endpoint:
        process = generate(endpoint.url, tmp_path, 200, concurrency=4, max_retries=1)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "answered none of the last 20 requests: status 503: gone" in stderr.replace("\n", " ")
        stored = (tmp_path / "answers.jsonl").read_bytes().count(b"\n")
        assert 50 <= stored < 60
        endpoint.script = script
        result = dataset(generate(endpoint.url, tmp_path, 200, concurrency=4), tmp_path)
        assert len(result["rows"]) == 200
        assert set(endpoint.answered.values()) == {1}


@contextmanager
def served_model(tmp_path):
    """`transformers serve` with the embedded model; its address and the name it knows the model by."""
    model = model_path(pin_revision(ModelConfig(name_or_path=EMBEDDED_MODEL)), Settings())
    port = free_port()
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu", "--port", str(port)],
            # One thread: several wait for each other at every layer when the machine has other work.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        server.wait(30)


def test_datasets_from_transformers_serve(fresh_project, tmp_path):
    """The real server with the real model: too small for JSON, and every passage is accounted for."""
    with served_model(tmp_path) as (url, model):
        options = {
            "data.instructions": "null", "documents.max_passages": 12, "generation.client": "openai",
            "generation.model": model, "generation.base_url": url, "generation.temperature": 0,
            "generation.question_max_new_tokens": 64,
            "generation.concurrency": 2, "generation.timeout_s": 120, "data.split.test_fraction": 0.3,
            "data.split.validation_fraction": 0.3,
        }  # fmt: skip
        arguments = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
        # The server leaves response_format unread, which the run is told before any work.
        refused = fresh_project.run("datasets", *arguments)
        assert refused.code == 2, refused.stderr
        assert "does not follow a JSON schema" in refused.stderr
        assert "generation.response_format: prompt" in refused.stderr
        assert not (fresh_project.folder / "outputs" / "answers.jsonl").exists()

        run = fresh_project.run("datasets", *arguments, "--set", "generation.response_format=text")
    assert run.code == 0, run.stderr
    candidates = fresh_project.folder / "candidates.py"
    candidates.write_text(
        "import tools.cli, json, steps.materializers\n"
        "from zenml.client import Client\n"
        "found = Client().get_artifact_version('preference_candidates').load()\n"
        "print(json.dumps({name: part.to_list() for name, part in found.items()}))\n"
    )
    found = fresh_project.script(str(candidates)).json
    counts = {count["stage"]: count for count in found["counts"]}
    for stage in ("instruction", "preference"):
        rejected = [row for row in found["quarantine"] if row["stage"] == stage]
        assert counts[stage]["read"] == counts[stage]["kept"] + len(rejected)
        if stage == "instruction":
            assert counts[stage]["read"] == 12
    assert found["rows"]
    for row in found["rows"]:
        assert row["origin"].startswith("chosen: question (prompt ")
        # The base model of the recipe is another one, in the process.
        assert f" by {model} at {url}, answer from the document; rejected by " in row["origin"]
        assert row["origin"].endswith(" in float32")


def test_bedrock_speaks_converse(tmp_path, monkeypatch):
    """boto3's real client against the scripted endpoint, with faults, in threads."""
    with ScriptedEndpoint(scripted(seed=2, faults=0.3, latency_s=(0.0, 0.01), hang_s=2.5)) as endpoint:
        for name, value in {
            "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": endpoint.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "eu-central-1",
        }.items():
            monkeypatch.setenv(name, value)
        process = generate(
            endpoint.url, tmp_path, 150, client="bedrock", base_url=None, concurrency=16, timeout_s=2.0, temperature=0.5
        )
        result = dataset(process, tmp_path)
    assert len(result["rows"]) + len(result["rejected"]) == 150
    assert {row["reason"] for row in result["rejected"]} <= {"bad_json", "wrong_schema"}
    assert result["rows"][0]["origin"].endswith("by m at Bedrock eu-central-1, answer from the document")
    assert {"200", "429", "500", "dropped"} == endpoint.statuses.keys()
    assert set(endpoint.answered.values()) == {1}
    body = endpoint.requests[0].body
    assert body["inferenceConfig"] == {"maxTokens": 100, "temperature": 0.5}
    assert json.loads(body["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"])["required"] == [
        "instruction"
    ]
