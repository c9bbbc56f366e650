"""Several processes promote versions of one model at the same moment. Each has read the production version just before.

Usage: python -m tests.integration.race. It prints one JSON object with the results of each round and the final stages.
"""

import json
import multiprocessing
import os
from typing import Any

import tools.cli  # noqa: F401 — before ZenML

ROUNDS, PROCESSES = 3, 3


def race(index: int, environment: dict[str, str], barrier: Any, results: Any) -> None:
    os.environ.update(environment)
    from zenml.client import Client

    from pipelines.registry import StaleError, move, stages

    for turn in range(ROUNDS):
        version = Client().get_model_version("raced", turn * PROCESSES + index + 1)
        production = stages("raced").production
        seen = production[-1].number if production else None
        barrier.wait()
        try:
            move(version, "production", seen, f"process {index}", "")
            results.put((turn, version.number, "moved"))
        except StaleError as error:
            results.put((turn, version.number, str(error)))
        barrier.wait()


def overtaken(first: Any, second: Any) -> str:
    """Promote `first`, and promote `second` just before the state of `first` is saved."""
    from pipelines import registry

    real = registry.save_artifact
    seen = registry.stages("raced").production[-1].number

    def late(*arguments: Any, **options: Any) -> Any:
        registry.save_artifact = real
        registry.move(second, "production", seen, "the faster one", "")
        return real(*arguments, **options)

    registry.save_artifact = late
    try:
        registry.move(first, "production", seen, "the slower one", "")
    except registry.StaleError as error:
        return str(error)
    return "moved"


def killed(version: Any) -> None:
    """Promote a version, and stop before ZenML's own stages are set."""
    from pipelines import registry

    real, seen = registry.copy_stages_to_zenml, registry.stages("raced").production[-1].number

    def kill(model: str) -> None:
        raise KeyboardInterrupt

    registry.copy_stages_to_zenml = kill
    try:
        registry.move(version, "production", seen, "killed", "")
    except KeyboardInterrupt:
        registry.copy_stages_to_zenml = real


def main() -> None:
    from zenml.client import Client

    from pipelines import registry
    from pipelines.registry import history, roll_back, stages

    def in_production() -> list[int]:
        found = Client().list_model_versions(model_name_or_id="raced", stage="production").items
        return [version.number for version in found]

    Client().create_model("raced")
    versions = [Client().create_model_version("raced") for _ in range(ROUNDS * PROCESSES + 3)]
    context = multiprocessing.get_context("forkserver")  # the start method by which this process was started
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=race, args=(index, dict(os.environ), barrier, results)) for index in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in range(ROUNDS * PROCESSES)]
    for process in processes:
        process.join()
    after_race = {
        "in_production": in_production(),
        "history": [held.number for held in stages("raced").production],
        "changes": [change.version for change in history("raced")],
    }
    first, second, third = versions[-3:]
    outcome = overtaken(first, second)
    after_overtaking = in_production()
    killed(third)
    between = [stages("raced").production[-1].number, *in_production()]
    registry.move(first, "staging", third.number, "the next one", "")
    repaired = in_production()
    roll_back("raced", "someone", "")
    print(
        json.dumps(
            {
                "results": sorted(found),
                **after_race,
                "overtaken": [outcome, after_overtaking, second.number],
                "killed": [third.number, between, repaired, in_production()],
            }
        )
    )


if __name__ == "__main__":
    main()
