"""Feedback from production: requests to a real server are logged, and thumbs on its answers train the next model."""

import signal
from dataclasses import dataclass

import openai
import pytest

from llm_engineering.feedback.served import read_answers
from tests.integration.conftest import Project, make_project
from tools.servers.serve import free_port

MAIL, KEY = "anna.berg@firma.de", "ghp_16C7e42F292c6912E7710c838347Ae178B4a"
QUESTIONS = 36
KTO = """
extends: {recipe}
chain: [kto]
data: {{labelled: feedback}}
kto: {{learning_rate: 1e-2, num_train_epochs: 1, per_device_train_batch_size: 4, gradient_accumulation_steps: 1,
  eval_steps: 8, save_steps: 8}}
evaluation: {{generated_rows: 2, sample_answers: 2, max_new_tokens: 2, bootstrap_samples: 100}}
promotion:
  kto: {{better_than: {{base: {{heldout_loss: 0.0}}, incumbent: {{heldout_loss: 0.0}}}}}}
"""
DATASETS = """
import tools.cli, json, steps.materializers, sys
from zenml.client import Client
rows = {}
for name in ("human_labelled", "labelled_dataset"):
    found = Client().get_artifact_version(name).load()
    rows[name] = {part: table.to_list() for part, table in found.items()}
decision = Client().get_artifact_version("promotion_decision").load()
from llm_engineering.recipe.loading import load_recipe
from tools.servers.review import covered_by
passages, heldout = covered_by(load_recipe(sys.argv[1], ["exam.path=embedded:handbook"]))
print(json.dumps({**rows, "decision": decision.model_dump(mode="json"), "passages": len(passages), "heldout": heldout}))
"""


@dataclass
class Served:
    """A project whose server was asked and judged, and then killed.

    Attributes:
        answers: the text of each answer by its id.
        liked: the id of the one with a thumb up.
    """

    project: Project
    answers: dict[str, str]
    liked: str


@pytest.fixture(scope="module")
def served(tiny_model, unused, tmp_path_factory) -> Served:
    project = make_project(tmp_path_factory.mktemp("feedback"), tiny_model, unused)
    trained = project.run("sft", "--set", "sft.num_train_epochs=1")
    assert trained.code == 0, trained.stderr
    port, answers = free_port(), {}
    options = ("--version", "1", "--port", str(port), "--set", "serving.log_requests=true")
    process = project.start("serve", "--config", str(project.recipe), *options)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving: "), process.stderr.read()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def ask(question, **more):
            messages = [{"role": "user", "content": question}]
            return client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, **more)

        for number in range(QUESTIONS):
            # The first are questions of the dataset, and what people say about its held-out ones is set aside.
            answer = ask(
                f"Where does the number {number} stand?" if number < 6 else f"Who counts to the number {number}?"
            )
            answers[answer.id] = answer.choices[0].message.content
            said = {"id": answer.id, "thumbs": "down", "user": "anna"}
            said["correction"] = f"The number {number} stands between {number - 1} and {number + 1}. Ask {MAIL}."
            client.post("/feedback", cast_to=object, body=said)
        # This model never ends an answer, and a cut one is no good one: the second one ends before a character of the first.
        cut = ask("Who likes the number 99?")
        text = cut.choices[0].message.content
        liked = ask("Who likes the number 99?", stop=[max(text, key=text.index)])
        client.post("/feedback", cast_to=object, body={"id": liked.id, "thumbs": "up", "user": "ben"})
        answers |= {one.id: one.choices[0].message.content for one in (cut, liked)}
        chunks = list(ask(f"I am {MAIL}, and my key is {KEY}. Where am I?", stream=True))
        answers[chunks[0].id] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        # Killed while it answers.
        next(iter(client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "And then?"}], max_tokens=100, stream=True
        )))  # fmt: skip
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=60)
    return Served(project, answers, liked.id)


def test_every_answer_is_on_the_disk_after_a_kill_and_no_private_text(served):
    folder = served.project.folder / "outputs" / "served" / "tiny"
    logged = {record["id"]: record["answer"]["content"] for record in read_answers(folder)}
    assert logged == served.answers
    files = list(folder.iterdir())
    assert len(files) >= 2
    for file in files:
        assert MAIL not in file.read_text()
        assert KEY not in file.read_text()
        assert file.stat().st_mode & 0o077 == 0


def test_thumbs_become_rows_that_kto_trains_on_and_a_gate_judges(served):
    project = served.project
    recipe = project.folder / "kto.yaml"
    recipe.write_text(KTO.format(recipe=project.recipe))
    made = project.command("run", "datasets", "--config", str(recipe), "--json")
    assert made.code == 0, made.stderr
    run = project.command("run", "kto", "--config", str(recipe), "--json")
    assert run.code == 0, run.stderr
    # The same rows, not made again.
    for name in ("human_labelled", "labelled_dataset"):
        assert run.json["artifacts"][name] == made.json["artifacts"][name]
    script = project.folder / "datasets.py"
    script.write_text(DATASETS)
    rows = project.script(str(script), str(recipe)).json

    # What the page Drift compares with.
    assert rows["passages"] > 100
    assert rows["heldout"]
    assert all(question.startswith("Where does the number ") for question in rows["heldout"])

    people = rows["human_labelled"]["rows"]
    assert {row["by"] for row in people} == {"anna", "ben"}
    (liked,) = (row for row in people if row["by"] == "ben")
    assert (liked["label"], liked["completion"][0]["content"]) == (True, served.answers[served.liked])
    assert {row["about"] for row in people} == {"version 1"}
    bad = [row["completion"][0]["content"] for row in people if not row["label"]]
    assert sorted(bad) == sorted(list(served.answers.values())[:QUESTIONS])
    prepared = {part: rows["labelled_dataset"][part] for part in ("train", "validation", "test")}
    every = [row for part in prepared.values() for row in part]
    assert [row["label"] for row in every if row["origin"] == "human:ben"] == [True]
    good = [row for row in every if row["label"] and row["origin"] == "human:anna"]
    assert len(good) > 0.9 * QUESTIONS
    assert all(row["completion"][0]["content"].endswith("Ask [EMAIL].") for row in good)
    assert {row["origin"] for row in every} == {"human:anna", "human:ben"}

    trained = {label: sum(row["label"] == label for row in prepared["train"]) for label in (True, False)}
    assert f"kto: {trained[True]} good × weight 1 to {trained[False]} bad × weight 1 answers" in run.stderr
    decision = rows["decision"]
    assert decision["candidate"] == "kto"
    (verdict,) = {rule["verdict"] for rule in decision["rules"] if "base" in rule["name"]}
    assert verdict in ("passed", "failed")
    assert run.json["metrics"]["heldout_loss_kto"] != run.json["metrics"]["heldout_loss_base"]

    version = str(run.json["model_version"])
    shown = project.command("models", "evidence", version, "--config", str(recipe), "--json")
    assert shown.code == 0, shown.stderr
    assert [dataset["source"] for dataset in shown.json["datasets"]] == ["feedback of people"]
    assert not any("A model wrote" in limit for limit in shown.json["limits"])
