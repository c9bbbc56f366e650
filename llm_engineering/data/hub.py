"""What of a dataset may be published, and its files on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from pydantic import SecretStr

from llm_engineering.data.card import data_file, public_name
from llm_engineering.data.split import SPLITS
from llm_engineering.errors import RequestError
from llm_engineering.hub import publish


def check_secrets(dataset: DatasetDict, masked: bool) -> None:
    """Refuse rows in which credentials were found and left as they are.

    Args:
        dataset: with the table `findings` (columns `id`, `source`, `rule`, `detail`), if there were any.
        masked: whether the rule `secret` masked what it found.

    Raises:
        RequestError: there are such rows.
    """
    if masked or "findings" not in dataset:
        return
    found = [row for row in dataset["findings"] if row["rule"] == "secret"]
    if found:
        places = ", ".join(dict.fromkeys(row["source"] for row in found[:3]))
        raise RequestError(
            f"Credentials were found in {len(found)} places and not masked (the first: {places}); what is published "
            "cannot be taken back. Set data.rules.secret to mask or drop and make the dataset anew, or pass "
            "--allow-secrets if they are none."
        )


def public_rows(dataset: DatasetDict, places: Sequence[str]) -> DatasetDict:
    """The splits as they may be seen: without the folders of this machine in `source`, `origin` and `document`.

    Args:
        places: what the recipe names as model, documents and datasets; paths among them are cut to their names.
    """
    # A recipe may say `~/docs/`, and rows then name files below the folder that this stands for.
    forms = {form for place in places for form in (place.rstrip("/"), str(Path(place).expanduser()))}
    hidden = {form: public_name(form) for form in sorted(forms, key=len, reverse=True) if public_name(form) != form}

    if not hidden:
        return DatasetDict({split: dataset[split] for split in SPLITS})

    def hide(row: dict[str, Any]) -> dict[str, str]:
        texts = {column: str(row[column]) for column in ("source", "origin", "document")}
        for place, name in hidden.items():
            texts = {column: text.replace(place, name) for column, text in texts.items()}
        return texts

    return DatasetDict({split: dataset[split].map(hide, keep_in_memory=True) for split in SPLITS})


def push_dataset(dataset: DatasetDict, card: str, repo_id: str, private: bool, token: SecretStr | None) -> str:
    """Publish train, validation and test as Parquet with the card, in one commit; returns the dataset's address.

    Other tables of the dataset (quarantine, counts, findings) are not published. Files of a former push that are not written
    again are removed in the same commit.

    Raises:
        RequestError, WorkError: as `publish`, whose arguments these are.
    """
    with tempfile.TemporaryDirectory(prefix="push-") as folder:
        files: dict[str, bytes | Path] = {"README.md": card.encode()}
        for split in SPLITS:
            file = Path(folder, f"{split}.parquet")
            dataset[split].to_parquet(file)
            files[data_file(split)] = file
        return publish("dataset", files, repo_id, private, token, lambda file: file.startswith("data/"))
