"""KTO in ZenML, on the answers of generated pairs, with a model of two small layers and the real tokenizer."""

import json
from pathlib import Path

KTO = """
chain: [kto]
kto: {learning_rate: 1e-2, num_train_epochs: 1, per_device_train_batch_size: 4, gradient_accumulation_steps: 1,
  undesirable_weight: 3, eval_steps: 4, save_steps: 4}
evaluation: {generated_rows: 2, sample_answers: 2, max_new_tokens: 2, bootstrap_samples: 100}
promotion:
  kto: {better_than: {base: {preference_accuracy: 0.0}, incumbent: {heldout_loss: 0.0}}}
"""


def test_kto_trains_on_the_answers_of_pairs_and_is_measured_on_the_pairs(fresh_project):
    recipe = fresh_project.folder / "kto.yaml"
    recipe.write_text(f"extends: {fresh_project.recipe}\n{KTO}")
    run = fresh_project.command("run", "kto", "--config", str(recipe), "--json")
    assert run.code == 0, run.stderr
    result = run.json
    assert {"labelled_candidates", "labelled_dataset", "formatted_kto", "kto_adapter"} <= result["artifacts"].keys()
    assert {"heldout_loss_kto", "preference_accuracy_base", "preference_accuracy_kto"} <= result["metrics"].keys()
    assert "bad × weight 3 answers" in run.stderr
    assert "outside 1:1 to 4:3" in run.stderr
    reports = [json.loads(path.read_text()) for path in Path(fresh_project.folder, "stores").rglob("report.json")]
    (data,) = [report for report in reports if report.get("kind") == "labelled"]
    assert set(data["trained"]) == {"good answers", "bad answers"}
    assert data["stages"]["labelled"]["read"] == 2 * data["stages"]["preference"]["kept"]
    judged = next(report for report in reports if "measures" in report)
    assert judged["models"] == ["base", "kto"]
