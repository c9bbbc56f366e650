"""Decisions of a reviewer on texts, labelled answers and prompts of a run, and the rows that the next run trains on."""

import json
import re

import httpx

from tests.conftest import free_port
from tests.integration.chromium import printed_url

RECIPE = """
extends: {recipe}
chain: [cpt, kto, grpo]
documents: {{path: {documents}}}
data: {{rules: {{near_duplicate: "off"}}}}
cpt:
  learning_rate: 1e-3
  num_train_epochs: 1
  max_steps: 2
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 1
  eval_steps: 2
  save_steps: 2
kto:
  learning_rate: 1e-3
  num_train_epochs: 1
  max_steps: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  eval_steps: 2
  save_steps: 2
grpo:
  learning_rate: 1e-3
  num_train_epochs: 1
  max_steps: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  num_generations: 2
  max_completion_length: 4
  eval_strategy: epoch
  save_strategy: epoch
  rewards: [{{use: "{rewards}:differing"}}]
  trust_reward_code: true
evaluation: {{generated_rows: 2, sample_answers: 2, max_new_tokens: 2, bootstrap_samples: 100}}
promotion:
  sft: null
  dpo: null
  cpt: {{better_than: {{base: {{document_loss: 0.0}}, incumbent: {{document_loss: 0.0}}}}}}
  kto: {{better_than: {{base: {{heldout_loss: 0.0}}, incumbent: {{heldout_loss: 0.0}}}}}}
  grpo: {{better_than: {{base: {{reward: 0.0}}, incumbent: {{reward: 0.0}}}}}}
"""
REWARDS = """
import itertools
numbers = itertools.count()
def differing(prompts, completions):
    return [next(numbers) % 3 for _ in completions]
"""
# Prints the rows that each stage has trained on, as text, and what was set aside of its kind of rows.
READ = """
import json, sys, tools.cli
tools.cli.prepare_zenml()
import steps.materializers
from transformers import AutoTokenizer
from zenml.client import Client
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = {}
for kind, stage in (("text", "cpt"), ("labelled", "kto"), ("prompt", "grpo")):
    read = Client().get_artifact_version(f"{kind}_dataset").load()["quarantine"]
    rows = Client().get_artifact_version(f"formatted_{stage}").load()
    ids = [record.get("input_ids") or record["prompt_ids"] + record.get("completion_ids", []) for record in rows["train"]]
    found[stage] = {
        "rows": [[tokenizer.decode(one, skip_special_tokens=True), record.get("label")] for one, record in zip(ids, rows["train"])],
        "aside": [[one["reason"], one["detail"]] for one in read if one["reason"] == "dropped_by_reviewer"],
    }
print(json.dumps(found))
"""
KEYS = {"text": ("texts", "cpt"), "labelled": ("labelled", "kto"), "prompt": ("prompts", "grpo")}
EDITED = {
    "text": "A reviewer has written this text.",
    "labelled": "A better answer.",
    "prompt": "What does a reviewer ask?",
}


def test_texts_labelled_answers_and_prompts_are_trained_as_a_reviewer_left_them(fresh_project, tiny_model):
    documents, rewards = fresh_project.folder / "documents", fresh_project.folder / "rewards.py"
    documents.mkdir()
    rewards.write_text(REWARDS)
    for i in range(24):
        text = " ".join(f"The number {n} of file {i} comes after {n - 1}." for n in range(i, i + 6))
        (documents / f"{i:02}.txt").write_text(text)
    recipe = fresh_project.folder / "reviewed.yaml"
    recipe.write_text(RECIPE.format(recipe=fresh_project.recipe, documents=documents, rewards=rewards))
    made = fresh_project.command("run", "datasets", "--config", str(recipe))
    assert made.code == 0, made.stderr

    port = free_port()
    server = fresh_project.start("review", "--config", str(recipe), "--port", str(port))
    try:
        url = printed_url(server, rf"Review: (http://127\.0\.0\.1:{port}/[\w-]{{32}}/) ")
        dropped = {kind: decide_on(kind, url) for kind in KEYS}
    finally:
        server.kill()
        server.communicate()

    named = [word for key, _ in KEYS.values() for word in ("--set", f"data.{key}=review")]
    run = fresh_project.command("run", "retrain", "--config", str(recipe), *named, "--json")
    assert run.code == 0, run.stderr
    assert {"human_texts", "human_labelled", "human_prompts"} <= run.json["artifacts"].keys()
    script = fresh_project.folder / "read.py"
    script.write_text(READ)
    trained = fresh_project.script(str(script), str(tiny_model)).json
    for kind, (_, stage) in KEYS.items():
        texts = [text for text, _ in trained[stage]["rows"]]
        assert sum(EDITED[kind] in text for text in texts) == 1
        assert not any(dropped[kind] in text for text in texts), stage
        assert trained[stage]["aside"] == [["dropped_by_reviewer", "Ann: wrong"]]
    (label,) = [label for text, label in trained["kto"]["rows"] if EDITED["labelled"] in text]
    assert label is False


def decide_on(kind, url):
    """Drop a row of the train split and edit another one; returns the text that only the dropped row has."""
    with httpx.Client(trust_env=False) as client:
        listed = client.get(f"{url}data").text
        key = re.search(rf'/data/([\w-]+)">{kind} dataset', listed)[1]
        page = client.get(f"{url}data/{key}?split=train").text
        assert f"data.{KEYS[kind][0]}: review" in page
        secret = re.search(r'name="write-secret" content="([\w-]+)"', page)[1]
        rows = re.findall(r'data-id="(\w+)" data-path="([^"]+)"', page)
        cards = page.split("<article")[1:]
        texts = [re.findall(r'<div class="text" dir="auto">(.*?)</div>', card, re.DOTALL) for card in cards]
        # Rejected answers of this model have no text. A good answer becomes a bad one.
        good = [place for place, card in enumerate(cards) if kind != "labelled" or "good answer" in card]
        edited, dropped = good[:2]
        path = {"text": "text", "labelled": "completion.0.content", "prompt": "prompt.0.content"}[kind]
        changed = {path: EDITED[kind], **({"label": "bad"} if kind == "labelled" else {})}
        for place, body in (
            (edited, {"action": "edit", "texts": changed}),
            (dropped, {"action": "drop", "reason": "wrong"}),
        ):
            number, address = rows[place]
            headers = {"x-review-write": secret, "content-type": "application/json"}
            content = json.dumps({"id": number, "reviewer": "Ann", **body})
            answer = client.post(f"{url}{address.lstrip('/')}/decision", content=content, headers=headers)
            assert answer.status_code == 200, answer.text
        return texts[dropped][-1 if kind == "labelled" else 0]
