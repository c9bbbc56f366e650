"""Recipes: `extends`, `--set`, and errors that name the file, the key and the nearest valid key."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import check_name, load_recipe, name_for, recipe_hash
from llm_engineering.recipe.recipe import Recipe

LOCAL = Path(__file__).resolve().parents[3] / "configs" / "python_reference.yaml"


@pytest.mark.parametrize("recipe", sorted(LOCAL.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(recipe):
    load_recipe(recipe)


def write(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_extends_merges_key_by_key(tmp_path):
    write(tmp_path / "base.yaml", extends=str(LOCAL), sft={"lora": {"r": 4}})
    recipe = load_recipe(write(tmp_path / "child.yaml", extends="base.yaml", dpo={"beta": 0.5}))
    assert recipe.sft.lora.r == 4
    assert recipe.dpo.beta == 0.5
    assert recipe.sft.lora.lora_alpha == load_recipe(LOCAL).sft.lora.lora_alpha


def test_set_overrides_last_and_reads_exponents_as_numbers():
    recipe = load_recipe(LOCAL, ["sft.learning_rate=1e-4", "dpo.beta=0.3", "documents.max_passages=null"])
    assert recipe.sft.learning_rate == 1e-4
    assert recipe.dpo.beta == 0.3
    assert recipe.documents.max_passages is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.learning_rat=1", ["`sft.learning_rat`", "`sft.learning_rate`", "--set"]),
        ("learning_rate=1", ["unknown key `learning_rate`", "`sft.learning_rate`", "`dpo.learning_rate`"]),
        ("sft.lora.rank=8", ["`sft.lora.rank`", "r, lora_alpha"]),
        ("sft.lora.alpha=8", ["`sft.lora.alpha`", "`sft.lora.lora_alpha`"]),
        ("sft.num_train_epochs=many", ["`sft.num_train_epochs` is 'many'", "number"]),
        ("dpo.beta=0", ["`dpo.beta` is 0", "greater than 0"]),
        ("sft.learning_rate=.nan", ["`sft.learning_rate`"]),
        ("sft.max_steps=0", ["`sft`", "max_steps is 0"]),
        ("documents.passage_min_chars=9999", ["passage_min_chars (9999) is larger than passage_max_chars"]),
        ("data.split.test_fraction=0.95", ["leave no row to train on"]),
        ("evaluation.generated_rows=5", ["sample_answers (20) is larger than generated_rows (5)"]),
        ("evaluation.judge={modle: x}", ["`evaluation.judge.modle`", "`evaluation.judge.model`"]),
        ("evaluation.judge={temperature: 0.7}", ["a judge answers at temperature 0"]),
        ("evaluation.lm_eval={tasks: []}", ["`evaluation.lm_eval.tasks`"]),
        ("compute.target=sagemakr", ["`compute.target` is 'sagemakr'", "'local'"]),
        ("sft", ["not of the form key.path=value"]),
    ],
)
def test_a_wrong_override_names_the_key_and_the_nearest_valid_key(override, words):
    with pytest.raises(RequestError) as error:
        load_recipe(LOCAL, [override])
    for word in words:
        assert word in str(error.value)


def test_blocks_that_contradict_each_other_are_refused():
    with pytest.raises(RequestError, match="float16 does not train on compute.device cpu"):
        load_recipe(LOCAL, ["compute.device=cpu", "compute.dtype=float16"])


def test_error_names_the_file_that_holds_the_key(tmp_path):
    write(tmp_path / "parent.yaml", extends=str(LOCAL), sft={"betta": 1})
    with pytest.raises(RequestError, match=r"parent\.yaml: unknown key `sft\.betta`"):
        load_recipe(write(tmp_path / "child.yaml", extends="parent.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", 'line 2, column 1: found duplicate key "name"\\.$'),
        ("sft: {seed: 1}\nsft:\n  seed: 2\n", 'line 2, column 1: found duplicate key "sft"\\.$'),
        ("? [1]\n: 2\n", "keys should be strings"),
        ("name: [1\n", "is not valid YAML: line"),
        ("- a\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("extends: nowhere.yaml\n", "There is no recipe file"),
    ],
)
def test_a_broken_recipe_is_explained(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=words):
        load_recipe(path)


def test_blocks_may_share_keys_by_an_anchor(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"extends: {LOCAL}\nsft: &shared\n  weight_decay: 0.25\ndpo:\n  <<: *shared\n")
    assert load_recipe(path).dpo.weight_decay == 0.25


def test_a_circle_of_extends_is_refused(tmp_path):
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="a.yaml")
    with pytest.raises(RequestError, match="goes in a circle"):
        load_recipe(tmp_path / "a.yaml")


def test_hash_changes_with_any_value():
    hashes = {recipe_hash(load_recipe(LOCAL, [o])) for o in ("seed=1", "seed=2", "sft.lora.r=3", "tracking.comet=off")}
    assert len(hashes) == 4
    assert recipe_hash(load_recipe(LOCAL)) == recipe_hash(load_recipe(LOCAL))


@pytest.mark.parametrize("file", sorted((LOCAL.parent).glob("*.yaml")), ids=lambda file: file.stem)
def test_each_recipe_of_the_project_is_valid_and_opens_with_its_command(file):
    load_recipe(file)
    schema, command = file.read_text(encoding="utf-8").splitlines()[:2]
    assert schema == "# yaml-language-server: $schema=recipe.schema.json"
    assert command.startswith("# make ")
    assert file.name == "local.yaml" or f"CONFIG=configs/{file.name}" in command


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["documents.path=docs/Acme Ltd"], "`documents.path` is docs/Acme Ltd, and `name` is still python-reference"),
        (["documents={path: acme/}"], "Add --set name=acme,"),
        (["documents.path=embedded:handbook"], "Add --set name=handbook,"),
        (["data.instructions=rows.jsonl"], "`data.instructions` is rows.jsonl"),
        (["data.preferences=owner/pairs#train"], "Add --set name=pairs,"),
    ],
)
def test_other_data_under_the_name_of_an_embedded_source_is_refused(overrides, words):
    load_recipe(LOCAL, overrides)
    with pytest.raises(RequestError) as error:
        check_name(LOCAL, overrides)
    assert words in str(error.value)
    assert f"which {LOCAL} gives to the model of embedded:python-reference" in str(error.value)
    for named in ([*overrides, "name=acme"], ["name=acme", *overrides]):
        check_name(LOCAL, named)


def test_the_model_of_a_recipe_with_rows_of_its_own_is_named_by_them():
    arithmetic = Path(LOCAL).with_name("grpo_arithmetic.yaml")
    with pytest.raises(RequestError, match="gives to the model of examples/arithmetic.jsonl"):
        check_name(arithmetic, ["data.prompts=mine.jsonl"])


@pytest.mark.parametrize(
    "overrides",
    [[], ["sft.learning_rate=1e-3"], ["documents.max_passages=5"], ["documents.path=embedded:python-reference"]],
)
def test_the_same_data_keeps_the_name(overrides):
    check_name(LOCAL, overrides)


def test_a_recipe_that_extends_another_one_and_reads_other_documents_needs_a_name(tmp_path):
    unnamed = write(tmp_path / "mine.yaml", extends=str(LOCAL), documents={"path": "acme"})
    with pytest.raises(RequestError, match=rf"mine.yaml: `documents.path` is acme.*Write `name: acme` in {unnamed}"):
        check_name(unnamed)
    named = write(tmp_path / "named.yaml", extends="mine.yaml", name="acme")
    check_name(named)
    # The name of one's own source may be used for other data: a person has chosen it.
    check_name(named, ["documents.path=acme-2"])
    check_name(
        write(tmp_path / "rows.yaml", extends=str(LOCAL), name="acme", data={"instructions": "a.jsonl"}),
        ["documents.path=x"],
    )


@pytest.mark.parametrize("recipe", sorted(LOCAL.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_have_names_of_their_own(recipe):
    check_name(recipe)


def test_a_name_is_made_of_the_last_part_of_a_path(tmp_path, monkeypatch):
    places = ["docs/", "/home/me/Acme & Söhne", "s3://bucket/acme/", "a/rows.jsonl", "owner/pairs#train", "--", "%%"]
    places += ["a--b/", "a..b.txt", "a.git/", "a - b-/"]
    assert [name_for(place) for place in places] == [
        "docs",
        "Acme-S-hne",
        "acme",
        "rows",
        "pairs",
        "my-model",
        "my-model",
        "a-b",
        "a.b",
        "a",
        "a-b",
    ]
    (tmp_path / "Here").mkdir()
    monkeypatch.chdir(tmp_path / "Here")
    assert name_for(".") == "Here"


@given(st.text("aZ0._-", min_size=1, max_size=100))
@settings(max_examples=300)
def test_a_name_is_accepted_if_the_hub_accepts_it(name):
    try:
        validate_repo_id(name)
        # The hub allows names that begin with an underscore; ZenML's and SageMaker's resources do not.
        allowed = name[0].isalnum()
    except HFValidationError:
        allowed = False
    problem = None
    try:
        Recipe.model_validate({"name": name})
    except ValidationError as error:
        problem = next((p for p in error.errors() if p["loc"] == ("name",)), None)
    assert (problem is None) == allowed


@pytest.mark.parametrize("name", ["my--model", "v1.", "a..b", "model-", "model.git"])
def test_a_name_that_cannot_be_served_is_refused(name):
    with pytest.raises(RequestError, match=f"`name`: {re.escape(name)} cannot be the name of a model on the hub"):
        load_recipe(LOCAL, [f"name={name}"])
