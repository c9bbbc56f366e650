"""Using the model of a run: export, a server with OpenAI's client, chat, comparison, publishing."""

import importlib.util
import json
import os
import pty
import re
import select
import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from tests.conftest import free_port
from tests.fakes.hub import running_hub
from tests.integration.conftest import ROOT, Run
from tests.integration.preloaded import Forked

QUESTION = "Where does the number 7 stand?"


@dataclass
class Handed:
    """The results of the commands, and the folder of the export.

    The export merges version 1, so no other module may do this before with the project that they share.
    """

    output: Path
    export: Run
    gguf: Run
    fp8: Run
    again: Run
    missing: Run
    chat: Run
    compare: Run
    unlicensed: Run


@pytest.fixture(scope="module")
def handed(project, finished_run, child_python):
    output = project.folder / "exported"
    recipe = ("--config", str(project.recipe))
    one = (*recipe, "--version", "1")
    exporting = replace(project, env=project.env | child_python)
    return Handed(
        output,
        export=project.command("models", "export", *one, "--output", str(output)),
        gguf=exporting.command(
            *("models", "export", *one, "--format", "gguf", "--quant", "Q8_0", "--output", f"{output}.gguf")
        ),
        fp8=project.command("models", "export", *one, "--quant", "FP8", "--output", f"{output}-fp8"),
        again=project.command("models", "export", *one, "--output", str(output)),
        missing=project.command("models", "export", *recipe, "--version", "99"),
        chat=project.command("chat", *one, "--prompt", QUESTION, "--max-new-tokens", "12"),
        compare=project.command("compare", *one, "--prompt", "Hi", "--max-new-tokens", "3"),
        unlicensed=project.command("models", "push", *one, "--repo", "someone/tiny"),
    )


@contextmanager
def served(project, port, *arguments):
    process = project.start("serve", "--config", str(project.recipe), "--port", str(port), *arguments)
    try:
        line = process.stdout.readline()
        assert line == f"Serving: http://127.0.0.1:{port}/v1, model tiny (Ctrl-C ends it)\n", process.stderr.read()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_export_prints_the_verification_and_registers_the_model(project, handed):
    run, output = handed.export, handed.output
    assert run.code == 0, run.stderr
    assert run.stdout.strip() == str(output)
    assert "tiny version 1" in run.stderr
    assert "Verified: " in run.stderr
    assert re.search(r"Registered:  merged_model version \d+\n", run.stderr)
    found = json.loads((output / "verification.json").read_text())
    assert found["dtype"] == "float32"
    assert found["same_top"] == found["tokens"] > 0
    assert found["largest_difference"] < 1e-3 < found["mean_training_effect"]
    card = (output / "README.md").read_text()
    assert "# tiny, version 1" in card
    assert "| Held-out loss | nats a token |" in card
    assert str(project.folder) not in card


@pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None and not os.environ.get("CI"),
    reason="needs llama.cpp (make setup, then pip install -c requirements.lock -e '.[gguf]')",
)
def test_a_quantised_file_is_asked_by_llama_cpp_and_has_its_card(handed):
    run, file = handed.gguf, handed.output.with_name("exported.gguf")
    assert run.code == 0, run.stderr
    assert run.stdout.strip() == str(file)
    assert {tensor.tensor_type.name for tensor in GGUFReader(file).tensors} == {"F32", "Q8_0"}
    card = file.with_name("exported.gguf.md").read_text()
    assert re.search(r"\| weights \| GGUF, Q8_0 \(tensors: \d+ F32, \d+ Q8_0\) \|", card)
    measured = re.search(r"The GGUF file was then compared with the merged model: (llama.cpp finds .*)\.\n", card)[1]
    assert f"Asked:       exported.gguf: {measured}\n" in run.stderr
    assert -0.01 < float(re.search(r"log-probabilities fall by (\S+) nats", measured)[1]) < 0.01
    assert not list(file.parent.glob(".exported*"))


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None and not os.environ.get("CI"),
    reason="needs llm-compressor (make setup, then pip install -c requirements.lock -e '.[compressed]')",
)
def test_weights_in_fp8_are_asked_by_transformers_and_have_their_card(handed):
    run, folder = handed.fp8, handed.output.with_name("exported-fp8")
    assert run.code == 0, run.stderr
    assert run.stdout.strip() == str(folder)
    card = (folder / "README.md").read_text()
    assert re.search(r"\| weights \| safetensors, FP8 \(tensors: \d+ BF16, \d+ F8_E4M3\) \|", card)
    measured = re.search(r"The safetensors file was then compared with the merged model: (transformers .*)\.\n", card)[
        1
    ]
    assert f"Asked:       exported-fp8: {measured}\n" in run.stderr


def test_wrong_requests(handed):
    """Files of the user are not replaced, a missing version is not substituted, and publishing needs a licence."""
    for run, words in (
        (handed.again, "exists and is not an empty folder"),
        (handed.missing, "There is no version 99 of tiny. Existing versions: "),
        (handed.unlicensed, "names no licence for publishing the model"),
    ):
        assert run.code == 2, run.stderr
        assert words in run.stderr


def test_the_served_answer_equals_the_answer_of_chat(project, handed):
    """OpenAI's client gets the same greedy tokens as `make chat`, also streamed. After SIGTERM the port is free."""
    assert handed.chat.code == 0, handed.chat.stderr
    # The registered model is used, and not merged again.
    assert "Verified" not in handed.chat.stderr
    port = free_port()
    with served(project, port, "--version", "1") as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked = {
            "model": "tiny", "temperature": 0, "max_tokens": 12,
            "messages": [{"role": "user", "content": QUESTION}],
        }  # fmt: skip
        answer = client.chat.completions.create(**asked)
        assert answer.choices[0].message.content.strip() == handed.chat.stdout.strip()
        # Neither the server nor the template adds a token to the prompt of training.
        tokenizer = AutoTokenizer.from_pretrained(handed.output)
        turn = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert answer.usage.prompt_tokens == len(prompt)
        streamed = "".join(
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        )
        assert streamed == answer.choices[0].message.content

        # Requests are not logged unless the recipe says so.
        assert not (project.folder / "outputs" / "served").exists()

        taken = project.command("serve", "--config", str(project.recipe), "--port", str(port))
        assert taken.code == 2
        assert f"Port {port} cannot be used: Address already in use." in taken.stderr

        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert stderr.endswith("The server has stopped.\n")
        assert not listens(port)


def test_a_conversation_on_a_terminal(project, handed):
    """Two turns on a pseudo-terminal; Ctrl-D ends it."""
    controller, terminal = pty.openpty()
    arguments = ("chat", "--config", str(project.recipe), "--version", "1", "--max-new-tokens", "3")
    process = Forked("tools.cli", arguments, project.env, ROOT, terminal=terminal)
    os.close(terminal)
    shown = b""
    try:
        for turn, typed in enumerate((b"Hi\n", b"And then?\n", b"\x04"), start=1):
            while shown.count(b"> ") < turn:
                assert select.select([controller], [], [], 120)[0], shown
                shown += os.read(controller, 1024)
            os.write(controller, typed)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(controller)
    assert process.returncode == 0, stderr
    assert stderr.count("[the answer was cut at 3 tokens") == 2


def test_chat_uses_the_promoted_model(project, handed):
    answer = project.command("chat", "--config", str(project.recipe), "--prompt", "Hi", "--max-new-tokens", "4")
    assert answer.code == 0, answer.stderr
    assert "tiny version" in answer.stderr


def test_chat_without_question_and_terminal_is_refused(project):
    run = project.command("chat", "--config", str(project.recipe))
    assert run.code == 2
    assert "--prompt is missing, and a conversation needs a terminal" in run.stderr


@pytest.mark.parametrize("tool", ["chat", "compare"])
def test_a_question_that_is_too_long_is_refused(project, handed, tool):
    arguments = ("--version", "1", "--prompt", "Why? " * 10, "--max-new-tokens", "100000")
    run = project.command(tool, "--config", str(project.recipe), *arguments)
    assert run.code == 2, run.stderr
    assert "The question and an answer of 100000 tokens do not fit into the model's context." in run.stderr


def test_sampling_with_a_seed_can_be_had_again(project, handed):
    """chat and compare draw at a temperature, and the same seed gives the same answer; a system message is read."""
    recipe = ("--config", str(project.recipe), "--version", "1", "--prompt", QUESTION, "--max-new-tokens", "12")
    drawn = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "7")
    once, again = (project.command("chat", *recipe, *drawn) for _ in range(2))
    assert once.code == 0, once.stderr
    assert once.stdout == again.stdout != handed.chat.stdout
    unseeded = project.command("chat", *recipe, "--temperature", "1.5")
    (seed,) = re.findall(r"Using --seed (\d+)", unseeded.stderr)
    assert project.command("chat", *recipe, "--temperature", "1.5", "--seed", seed).stdout == unseeded.stdout
    side_by_side = [project.command("compare", *recipe, *drawn, "--system", "Be brief.") for _ in range(2)]
    assert side_by_side[0].code == 0, side_by_side[0].stderr
    assert side_by_side[0].stdout == side_by_side[1].stdout
    # More words than the model can read.
    for command in ("chat", "compare"):
        told = project.command(command, *recipe, "--system", "Be brief. " * 2000)
        assert told.code == 2
        assert "tokens do not fit into the model's context" in told.stderr
    refused = project.command("compare", *recipe, "--top-p", "0.5")
    assert refused.code == 2
    assert "--top-p has no effect at temperature 0" in refused.stderr


def test_compare_shows_every_model_and_how_it_ended(handed):
    run = handed.compare
    assert run.code == 0, run.stderr
    assert "base" in run.stdout
    assert "SFT" in run.stdout
    assert run.stdout.count("[cut at 3 tokens]") == 2


LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
turn = [{"role": "user", "content": sys.argv[2]}]
ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**ids, max_new_tokens=12, do_sample=False)
print(json.dumps(tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def test_the_published_model_answers_like_the_trained_model(project, handed, tiny_model, tmp_path):
    """One commit with the card to a repository that is private by default; plain transformers loads the model from it."""
    token = "hf_planted_token_value"
    push = ("models", "push", "--config", str(project.recipe), "--version", "1", "--repo", "someone/tiny")
    with running_hub(token) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
                  "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        there = replace(project, env=project.env | online)
        licences = ("--set", "hub.license=mit", "--set", "hub.base_license=apache-2.0")
        run = there.command(*push, *licences)
        assert run.code == 0, run.stderr
        assert run.stdout.strip() == f"{hub.url}/someone/tiny"
        assert "Publishing:  someone/tiny, private" in run.stderr
        (created,) = hub.sent("POST", "/api/repos/create")
        assert created["visibility"] == "private"
        repo = hub.repos["someone/tiny"]
        assert len(repo.commits) == 1
        files = {file.name for file in handed.output.iterdir()}
        assert set(repo.files) == files
        card = repo.files["README.md"].decode()
        assert "license: mit" in card
        assert "| licence of the base model | apache-2.0 |" in card
        published = b"".join(repo.files.values())
        for hidden in (token, str(project.folder), str(tiny_model)):
            assert hidden.encode() not in published
        script = tmp_path / "load.py"
        script.write_text(LOAD)
        done = there.script(str(script), "someone/tiny", QUESTION)
        assert done.code == 0, done.stderr
    assert done.json.strip() == handed.chat.stdout.strip()
