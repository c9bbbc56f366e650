"""The training report: its headline is about the validation, and the recipe is YAML."""

import pytest
import yaml
from markupsafe import Markup

from llm_engineering.reports.training_report import outcome, training_page


def history(losses, name="eval_loss"):
    return [{"step": 10 * number, "loss": 1.0 / number, name: loss} for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "name", "load_best", "state", "words"),
    [
        ([2.0, 1.5, 1.2], "eval_loss", False, "good", "The last validation loss, in step 30, is also the best: 1.200."),
        ([2.0, 1.2, 1.5], "eval_loss", False, "mixed", "The best validation loss is 1.200, in step 20; the last is 1.500, in step 30."),
        ([2.0, 1.2, 1.5], "eval_loss", True, "good", "in step 30. The model is that of step 20."),
        # A higher reward is better.
        ([0.2, 0.6, 0.4], "eval_reward", False, "mixed", "The best validation reward is 0.600, in step 20; the last is 0.400"),
    ],
)  # fmt: skip
def test_the_headline_compares_the_best_with_the_last_validation(losses, name, load_best, state, words):
    verdict, said = outcome(history(losses, name), load_best)
    assert verdict.state == state
    assert words in said


def test_without_validation_there_is_no_verdict():
    assert outcome([{"step": 1, "loss": 0.1}], False) == (None, "Nothing was measured on validation rows.")


def test_the_page_has_the_recipe_as_yaml_and_the_first_row_as_its_sample():
    summary = {
        "stage": "sft",
        "steps": 30,
        "train_loss": 0.001,
        "history": history([2.0, 1.2, 1.5]),
        "config": {"learning_rate": 1e-4, "load_best": False},
        "labels": [[["first", True], ["<end>", True]], [["second", False]]],
        "end_token": "<end>",
        "device": {"device": "cpu"},
        "device_reasons": ["optimiser adamw: no card"],
        "effective_batch": 4,
        "num_processes": 1,
        "seconds": {"data": 0.12},
    }
    made = training_page(summary, {"Run": "sft-1"}, {"seed": 3})
    recipe = Markup(made[made.index("<pre>") + 5 : made.index("</pre>")]).unescape()
    assert yaml.safe_load(recipe) == {"seed": 3, "sft": {"learning_rate": 1e-4, "load_best": False}}
    places = [
        made.index(words) for words in ("sft-1", "The best validation loss is 1.200", ">first<", "Curves", ">second<")
    ]
    assert places == sorted(places)
    assert '<header class="strip mixed">' in made
    # Loss, learning rate and speed.
    assert made.count("<svg") == 3
