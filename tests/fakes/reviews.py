"""What the pages of the review show in tests: nothing, but for the parts that a test names."""

from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError
from llm_engineering.review.site import Covered, Reviews


def reviews(folder: Path, **parts: Any) -> Reviews:
    """Reviews of a recipe `tiny` without datasets, requests and documents. `parts` replace fields."""

    def no_dataset(key: str) -> None:
        raise RequestError(f"No dataset {key}. Choose another.")

    nothing: dict[str, Any] = {
        "recipe": "tiny",
        "folder": folder,
        "list_datasets": list,
        "open_dataset": no_dataset,
        "served": folder,
        "read_covered": lambda: Covered([], []),
    }
    return Reviews(**nothing | parts)
