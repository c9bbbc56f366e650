"""The quickstart notebook runs on a tiny model and an endpoint on loopback, and was committed without local paths."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.fakes.scripted_endpoint import Asked, Response, ScriptedEndpoint, completion
from tests.tiny_models import write_model

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def question(asked: Asked) -> Response:
    """A question made of long words of the passage, which follows its topic and precedes the task."""
    passage = asked.turns[0].split("\n\n")[1]
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{7,}\b", passage)))[:3]
    return completion(json.dumps({"instruction": f"What is meant by {', '.join(words)}?"}))


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """The notebook after all of its cells ran in folders of the test's own."""
    model = write_model(tmp_path / "model", "llama")
    for variable in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "LLM_CACHE_DIR", "LLM_OUTPUT_DIR", "IPYTHONDIR", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable in ("COMET_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
        # Empty, and not unset: the kernel reads .env in the project's folder.
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with ScriptedEndpoint(question) as endpoint:
        overrides = [
            f"model.name_or_path={model}",
            "formatting.chat_template=alpaca",
            # The tiny tokenizer has about a token for each character.
            "formatting.max_length=1024",
            "generation.client=openai",
            "generation.model=scripted",
            f"generation.base_url={endpoint.url}/v1",
            "generation.question_max_new_tokens=64",
            "sft.learning_rate=1e-2",
            "compute.device=cpu",
        ]
        monkeypatch.setenv("LLM_QUICKSTART_SET", json.dumps(overrides))
        # A kernel's own failure is an error here; a cell's failure has its traceback.
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    return notebook


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_notebook_trains_a_model_that_scores_held_out_answers_better(executed, tmp_path):
    text = printed(executed)
    losses = {name: float(loss) for name, loss in re.findall(r"^(base|sft) +held-out loss ([\d.]+)$", text, re.M)}
    assert losses["sft"] < losses["base"]
    labels = re.findall(r"^ +\d+ +(\d+) +(-?\d+)  (.*)$", text, re.M)
    trained = [(token, label, shown) for token, label, shown in labels if label != "-100"]
    assert labels[0][1] == "-100"
    assert all(token == label for token, label, _ in trained)
    assert trained[-1][2] == "'<|endoftext|>'"
    assert list((tmp_path / "LLM_OUTPUT_DIR" / "training").glob("sft-*/adapter/adapter_config.json"))


def test_committed_notebook_has_output_and_no_path_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert "held-out loss" in printed(notebook)
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert not re.search(r"/(home|root|tmp|Users|work)/|stderr|Traceback", outputs)
