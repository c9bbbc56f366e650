"""The datasets of a recipe on the machine of a scheduled job."""

import json

import pytest

from llm_engineering.cloud.schedules.job_recipe import job_recipe
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tests.conftest import ROOT


class Bucket:
    """A client of S3 whose bucket has an object at every address."""

    def list_objects_v2(self, Bucket: str, Prefix: str, MaxKeys: int) -> dict:  # noqa: N803
        return {"Contents": [{"Key": Prefix}]}


def rewritten(reference):
    recipe = load_recipe(ROOT / "configs" / "python_reference.yaml", [f"data.replay_instructions={reference}"])
    made = job_recipe(recipe, "bucket", Bucket())
    return made.recipe.data.replay_instructions, made.channels


def test_general_instructions_in_s3_are_placed_on_the_machine_of_the_job():
    path, channels = rewritten("s3://bucket/general.jsonl")
    assert channels == {"data-replay-instructions": "s3://bucket/general.jsonl"}
    assert path.endswith("/data-replay-instructions/general.jsonl")


def test_the_embedded_general_instructions_are_on_every_machine():
    assert rewritten("embedded:general") == ("embedded:general", {})
    assert rewritten("null") == (None, {})


def test_general_instructions_of_this_machine_are_refused(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps({"instruction": "What falls?", "output": "Rain."}) + "\n")
    with pytest.raises(RequestError, match=r"data.replay_instructions .*general.jsonl is on this machine"):
        rewritten(file)


def test_what_people_said_is_refused_because_a_job_cannot_see_it():
    recipe = load_recipe(
        ROOT / "configs" / "python_reference.yaml", ["data.preferences=[s3://bucket/rows.jsonl, review]"]
    )
    with pytest.raises(RequestError, match="data.preferences names review, and what people said is on this machine"):
        job_recipe(recipe, "bucket", Bucket())
