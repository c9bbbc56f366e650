"""Processes that move versions of one model at the same moment, each against the production it has just seen.

python -m tests.integration.race: prints one JSON object with what each round's processes came to, and the final stages.
"""

import json
import multiprocessing
from typing import Any

import tools.cli  # noqa: F401 — before ZenML

ROUNDS, PROCESSES = 3, 3


def race(index: int, barrier: Any, results: Any) -> None:
    from zenml.client import Client

    from steps.registry import StaleError, move, stages

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


def main() -> None:
    from zenml.client import Client

    from steps.registry import history, stages

    Client().create_model("raced")
    for _ in range(ROUNDS * PROCESSES):
        Client().create_model_version("raced")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=race, args=(index, barrier, results)) for index in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in range(ROUNDS * PROCESSES)]
    for process in processes:
        process.join()
    in_production = [v.number for v in Client().list_model_versions(model_name_or_id="raced", stage="production").items]
    state = stages("raced")
    print(
        json.dumps(
            {
                "results": sorted(found),
                "in_production": in_production,
                "history": [held.number for held in state.production],
                "changes": [change.version for change in history("raced")],
            }
        )
    )


if __name__ == "__main__":
    main()
