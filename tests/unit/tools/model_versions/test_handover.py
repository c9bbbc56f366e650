"""The facts of a version's datasets, from artifacts made by hand."""

from types import SimpleNamespace

import pytest

from llm_engineering.recipe.loading import load_recipe
from tests.conftest import ROOT
from tools.model_versions.handover import dataset_facts


@pytest.mark.parametrize(
    ("labelled", "source", "hashed"),
    [
        ("feedback", "feedback of people", "hash of human_labelled"),
        (None, "embedded:python-reference", "hash of files"),
    ],
)
def test_the_source_of_labelled_answers_is_people_if_all_are_of_feedback(labelled, source, hashed):
    recipe = load_recipe(ROOT / "configs" / "python_reference.yaml")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labelled": labelled})})
    counts = {"train": 1, "validation": 1, "test": 1, "quarantined": 0, "content_hash": "hash of files"}
    names = ("documents", "human_labelled", "labelled_dataset")
    own = {
        name: SimpleNamespace(
            artifact=SimpleNamespace(name=name), version="1", run_metadata=counts, content_hash=f"hash of {name}"
        )
        for name in names
    }
    facts = dataset_facts("labelled", "formatted_kto", own, recipe)
    assert (facts.source, facts.hash) == (source, hashed)
