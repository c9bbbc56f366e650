"""Prints what the newest dataset of pairs of a model has of people, and what the gate decided last. The argument is the name of the recipe."""

import json
import sys
from collections import Counter

from tools.cli import prepare_zenml

prepare_zenml()

from zenml.client import Client  # noqa: E402

from tools.model_versions.versions import all_versions, newest_artifacts  # noqa: E402

artifacts = newest_artifacts(all_versions(sys.argv[1])[0])
human, dataset = artifacts["human_preferences"], artifacts["preference_dataset"].load()
splits = {name: dict(Counter(dataset[name]["origin"])) for name in ("train", "validation", "test")}
facts = {name: human.run_metadata[name] for name in ("rows", "by", "about", "without_a_row")}
decision = Client().get_artifact_version("promotion_decision").load()
print(
    json.dumps(
        {
            "facts": facts,
            "human": len(human.load()["rows"]),
            "splits": splits,
            "decision": decision.model_dump(),
            "adapter": str(artifacts["dpo_adapter"].id),
        }
    )
)
