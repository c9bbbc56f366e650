"""An exam through the pipeline and as a command, with a model of two layers."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from tests.fakes.scripted_endpoint import Asked, Response, ScriptedEndpoint, completion
from tests.integration.conftest import Project

QUESTIONS = [
    {"id": "n1", "question": "Which number comes after seven?", "answers": ["8"], "facts": ["seven"], "documents": ["n.md"]},
    {"id": "n2", "question": "What follows the number seven?", "answers": ["8"], "facts": ["seven"], "documents": ["n.md"]},
    {"id": "n3", "question": "Which number comes before six?", "answers": ["5"], "facts": ["six"], "documents": ["n.md"]},
    {"id": "u1", "question": "Who invented the number six?", "kind": "unanswerable"},
]  # fmt: skip
GENERAL = [{"question": "What is the capital of France?", "answers": ["Paris"]}]


@pytest.fixture
def exam(fresh_project: Project) -> list[str]:
    """The options of a run with an exam about two documents."""
    folder = fresh_project.folder
    for name, rows in (("exam", QUESTIONS), ("control", GENERAL)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "documents").mkdir()
    for name, text in (("n.md", "# Seven\n\nAfter the number seven comes 8."), ("m.md", "# Other\n\nNothing else.")):
        (folder / "documents" / name).write_text(text)
    keys = {
        "exam.path": folder / "exam.jsonl",
        "exam.control": folder / "control.jsonl",
        "exam.max_new_tokens": 4,
        "exam.retrieval_passages": 1,
        "documents.path": folder / "documents",
        "documents.passage_min_chars": 10,
        "promotion.sft.better_than.base.exam_accuracy": 0.2,
    }
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def test_a_run_takes_the_exam_and_the_gate_refuses_a_model_that_cannot_answer(fresh_project, exam):
    run = fresh_project.run("sft", *exam)
    assert run.code == 0, run.stderr
    metrics = run.json["metrics"]
    arms = ("base", "sft", "base+retrieval", "sft+retrieval")
    measures = ("exam_accuracy", "exam_abstention")
    expected = {f"{measure}_{arm}" for measure in measures for arm in arms} | {"exam_control_base", "exam_control_sft"}
    assert {name for name in metrics if name.startswith("exam_")} == expected
    # The held-out loss of this model falls, and its answers are wrong.
    assert metrics["heldout_loss_sft"] < metrics["heldout_loss_base"]
    assert metrics["exam_accuracy_sft"] == 0
    assert "Failed: exam_accuracy better than base by more than 0.2" in run.stderr.replace("\n", " ")
    for words in ("3 exam questions, drawn with seed 42", "✗ wrong", "right answer"):
        assert words in run.stderr
    assert "One held-out question" not in run.stderr

    folder = Path(run.json["artifacts"]["evaluation_report"]["uri"], "files")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["exam"]["kinds"] == {"single": 3, "unanswerable": 1, "control": 1}
    assert report["measures"]["exam_accuracy"]["clusters"] == 2
    first = report["exam"]["rows"][0]
    assert [place.partition(":characters")[0] for place in first["retrieved"]] == ["n.md"]
    page = Path(run.json["artifacts"]["evaluation_page"]["uri"], "files", "report.html").read_text(encoding="utf-8")
    assert "in wordings that were not trained" in page
    assert page.count("✗ sft") >= 2
    assert "Gate refused" in page

    # A changed question trains again too, for no row may ask it.
    file = fresh_project.folder / "exam.jsonl"
    file.write_text(file.read_text().replace("What follows", "What comes after"))
    verified = fresh_project.command("models", "verify", "1", "--config", str(fresh_project.recipe))
    assert verified.code == 1
    assert "exam.jsonl" in verified.stdout
    again = fresh_project.run("sft", *exam)
    assert again.code == 0, again.stderr
    ran = [line for line in again.stderr.splitlines() if "│ sft: " in line and "completed" in line]
    assert [name for line in ran for name in ("evaluate", "promote", "train") if name in line] == [
        "train",
        "evaluate",
        "promote",
    ]

    # The command asks the models of that version the same questions.
    asked = fresh_project.command("exam", "--config", str(fresh_project.recipe), "--version", "1", "--json", *exam)
    assert asked.code == 0, asked.stderr
    found = asked.json["measures"]
    for name in ("base", "sft", "sft+retrieval"):
        assert found["exam_accuracy"]["models"][name]["value"] == metrics[f"exam_accuracy_{name}"]
    assert (fresh_project.folder / "outputs" / "exam" / "report.html").is_file()


@pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None and not os.environ.get("CI"),
    reason="needs llama.cpp (make setup, then pip install -c requirements.lock -e '.[gguf]')",
)
def test_an_exported_file_takes_the_exam_and_is_kept_only_within_the_bounds(fresh_project, exam, child_python):
    folder = fresh_project.folder
    # llama.cpp has two processes in each export.
    fresh_project.env |= child_python
    # The model learns one answer, so that its tokens have a lead over all others.
    rows = [
        {"instruction": f"Where does the number {i} stand?", "output": "Kel lies in the valley."} for i in range(60)
    ]
    (folder / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "exam.jsonl").write_text((folder / "exam.jsonl").read_text().replace('["8"]', '["valley"]'))
    run = fresh_project.run("sft", *exam, "--set", "sft.num_train_epochs=16", "--set", "exam.max_new_tokens=8")
    assert run.code == 0, run.stderr
    report = Path(run.json["artifacts"]["evaluation_report"]["uri"], "files", "report.json")
    asked = [row for row in json.loads(report.read_text())["exam"]["rows"] if row["kind"] == "single"]
    assert [row["answers"]["sft"]["right"] for row in asked] == [True, True, False]

    def export(name, *bound):
        options = ("--version", "1", "--format", "gguf", "--quant", "Q8_0", "--output", str(folder / name))
        return fresh_project.command("models", "export", "--config", str(fresh_project.recipe), *options, *bound)

    kept = export("kept.gguf")
    assert kept.code == 0, kept.stderr
    card = (folder / "kept.gguf.md").read_text()
    loss = float(re.search(r"log-probabilities fall by (\S+) nats on average and differ by \S+; it answers 2 of 3 exam "
                           r"questions right, and the trained model 2\.\n", card)[1])  # fmt: skip
    assert 0 < loss < 0.01

    worse = export("worse.gguf", "--set", "export.max_logprob_loss=1e-6")
    assert worse.code == 1
    assert re.search(
        r"Q8_0 lowers log-probabilities by \S+ nats on average, and export.max_logprob_loss is 1e-06", worse.stderr
    )
    # As if the trained model had known an answer that the file does not know.
    report.write_text(report.read_text().replace('"right": false', '"right": true'))
    lost = export("lost.gguf", "--set", "export.max_exam_loss=0.3")
    assert lost.code == 1
    assert "it answers 2 of 3 exam questions right, the trained model 3, and export.max_exam_loss is 0.3" in lost.stderr
    assert [file.name for file in sorted(folder.glob("*.gguf*"))] == ["kept.gguf", "kept.gguf.md"]


def test_the_command_asks_the_base_model_if_no_version_is_promoted(fresh_project, exam):
    done = fresh_project.command("exam", "--config", str(fresh_project.recipe), *exam)
    assert done.code == 0, done.stderr
    assert "No version of tiny is promoted, so only the base model is asked" in done.stderr
    for words in ("base+retrieval", "one fact", "not in the documents", "general", "drawn with seed 42"):
        assert words in done.stdout


def test_wrong_requests_are_refused_before_any_work(fresh_project, exam):
    command = ("exam", "--config", str(fresh_project.recipe))
    without = fresh_project.command(*command)
    assert without.code == 2
    assert "The recipe has no exam" in without.stderr
    (fresh_project.folder / "exam.jsonl").write_text('{"question": "Who?", "answer": "Kell"}\n')
    run = fresh_project.run("sft", *exam)
    assert run.code == 2
    assert "exam.jsonl, line 1: unknown key `answer`" in run.stderr


def writes_about_lamps(asked: Asked) -> Response:
    """Answer as a good writer that has never heard of a lamp: from the passage alone."""
    (turn,) = asked.turns
    lamp, place = re.search(r"lamp (\w+)", turn), re.search(r"stands in (\w+)", turn)
    if "Copy the words" in turn:
        return completion(json.dumps({"answer": place[1]}))
    if "to which this text answers" in turn:
        return completion(json.dumps({"question": f"In which village is the lamp {lamp[1]}?"}))
    if "Answer in a few words" in turn:
        return completion(json.dumps({"answer": place[1] if place else "unknown"}))
    name = lamp[1] if lamp else "none"
    return completion(json.dumps({"instruction": f"What is known about the lamp {name}?"}))


def test_a_run_writes_its_exam_and_every_command_uses_that_file(fresh_project):
    folder = fresh_project.folder
    (folder / "lamps").mkdir()
    for name in (f"Kel{a}{b}" for a in "abcdef" for b in "nrst"):
        text = f"The old lamp {name} stands in {name}burg, where people of the village light it on every evening of winter."
        (folder / "lamps" / f"{name}.md").write_text(f"# Lamps\n\n{text}\n")
    with ScriptedEndpoint(writes_about_lamps) as endpoint:
        keys = {
            "documents.path": folder / "lamps",
            "documents.passage_min_chars": 10,
            "data.instructions": "null",
            "data.rules.near_duplicate": "off",
            "generation.client": "openai",
            "generation.model": "m",
            "generation.base_url": f"{endpoint.url}/v1",
            "generation.question_max_new_tokens": 100,
            "exam.path": "generated",
            "exam.control": "null",
            "exam.questions": 10,
            "exam.max_new_tokens": 4,
            "promotion.sft.better_than.base.exam_accuracy": 0.1,
        }
        options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        run = fresh_project.run("sft", *options)
        assert run.code == 0, run.stderr
    written = Path(run.json["artifacts"]["exam"]["uri"], "files", "exam.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len([row for row in rows if row.get("kind") != "unanswerable"]) == 10
    assert all(row["answers"][0] in row["evidence"] for row in rows[:10])
    report = Path(run.json["artifacts"]["evaluation_report"]["uri"], "files", "report.json")
    asked = json.loads(report.read_text(encoding="utf-8"))["exam"]["rows"]
    assert [row["question"] for row in asked] == [row["question"] for row in rows]
    assert {"exam_accuracy_base", "exam_accuracy_sft"} <= run.json["metrics"].keys()
    assert re.search(r"exam +│ +\d+ │ +\d+ │ none", run.stderr)

    # The recipe of the version, without its endpoint, finds the file
    config = ("--config", str(fresh_project.recipe))
    exam = fresh_project.command("exam", *config, *options, "--version", "1", "--json")
    assert exam.code == 0, exam.stderr
    accuracy = exam.json["measures"]["exam_accuracy"]["models"]
    assert accuracy["sft"]["value"] == run.json["metrics"]["exam_accuracy_sft"]
    none = fresh_project.command("exam", *config, *options)
    assert none.code == 2
    assert "no version is promoted" in none.stderr
    lineage = fresh_project.command("models", "lineage", "1", *config, "--json")
    assert lineage.code == 0, lineage.stderr
    made = {artifact["name"]: artifact for artifact in lineage.json["artifacts"]}
    assert made["exam"]["step"] == "write_exam"
    assert "exam v1" in made["evaluation_report"]["from"]
    assert "exam v1" in made["instruction_dataset"]["from"]
    verified = fresh_project.command("models", "verify", "1", *config)
    assert verified.code == 0, verified.stdout
    written.write_text(written.read_text().replace("village", "town"))
    changed = fresh_project.command("models", "verify", "1", *config)
    assert changed.code == 1
    assert "exam.jsonl" in changed.stdout
