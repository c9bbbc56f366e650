"""Publishes models and datasets on the Hugging Face Hub, each in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
from datasets import DatasetDict
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from pydantic import SecretStr

from llm_engineering.data.rows import HUMAN, REPEATED, SPLITS
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.publish.dataset_card import data_file, public_name

RepoType = Literal["dataset", "model"]
# The block of the recipe with the settings for each kind.
_BLOCKS = {"dataset": "data.hub", "model": "hub"}
_ADDRESSES = {"dataset": "datasets/", "model": ""}


def check_repo_id(repo_id: str) -> None:
    """Check the name of a repository.

    Raises:
        RequestError: the name is not an `owner/name` that the hub accepts.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"{repo_id!r} is not a name of a repository: {error}") from None
    if repo_id.count("/") != 1:
        raise RequestError(
            f"{repo_id!r} does not name an owner. Write owner/name; the owner is you or an organisation."
        )


def find_token(token: SecretStr | None) -> str:
    """The given token, or the token that `hf auth login` stored.

    Raises:
        RequestError: there is no token.
    """
    secret = token.get_secret_value() if token else get_token()
    if not secret:
        raise RequestError(
            "There is no token for the Hugging Face Hub. Set HF_TOKEN, in the environment or in .env, to a token that may "
            "write (https://huggingface.co/settings/tokens)."
        )
    return secret


def publish(
    kind: RepoType,
    files: Mapping[str, bytes | Path],
    repo_id: str,
    private: bool,
    token: SecretStr | None,
    is_ours: Callable[[str], bool],
) -> str:
    """Publish files in one commit; returns the repository's address.

    Args:
        files: contents or local files, by their paths in the repository.
        private: the visibility of a new repository; an existing repository must have it.
        token: a token that may write; None takes the token that `hf auth login` stored.
        is_ours: whether a file of the repository is removed if it is not among `files`.

    Raises:
        RequestError: the name is invalid, there is no token, the hub refuses it, or an existing repository has the
            other visibility.
        WorkError: the hub cannot be reached, or fails.
    """
    check_repo_id(repo_id)
    api = HfApi(token=find_token(token))
    try:
        api.whoami()
        former = _files_of(api, kind, repo_id, private)
        if former is None:
            api.create_repo(repo_id, repo_type=kind, private=private)
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        stale = [file for file in former or () if is_ours(file) and file not in files]
        api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=f"Publish the {kind}",
            repo_type=kind,
        )
    except OfflineModeIsEnabled as error:
        raise RequestError("HF_HUB_OFFLINE is set, so nothing can be published: unset it.") from error
    except HfHubHTTPError as error:
        raise _explained(error, repo_id) from error
    except ValueError as error:
        # huggingface_hub raises ValueError if the hub refuses the card's metadata.
        if not str(error).startswith("Invalid metadata"):
            raise
        raise RequestError(
            f"The hub refuses the card: {' '.join(str(error).split())}. Correct licence and language in the recipe's "
            f"{_BLOCKS[kind]}."
        ) from error
    except httpx.HTTPError as error:
        raise WorkError(
            f"The hub at {api.endpoint} cannot be reached ({type(error).__name__}). Check the network and HF_ENDPOINT, "
            "and run the command again: it starts from the beginning."
        ) from error
    return f"{api.endpoint}/{_ADDRESSES[kind]}{repo_id}"


def _files_of(api: HfApi, kind: RepoType, repo_id: str, private: bool) -> Sequence[str] | None:
    """The files of a repository; None if it does not exist.

    Raises:
        RequestError: the repository has the other visibility.
    """
    try:
        info = api.dataset_info(repo_id) if kind == "dataset" else api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if bool(info.private) != private:
        now, asked = ("private", "public") if info.private else ("public", "private")
        instead = f"{_BLOCKS[kind]}.private: true, without --public" if info.private else "--public"
        raise RequestError(
            f"{repo_id} exists and is {now}, and the {kind} was to be {asked}. Change the visibility in the "
            f"repository's settings on the hub, name another repository with --repo, or publish as {now} ({instead})."
        )
    return [file.rfilename for file in info.siblings or ()]


def _explained(error: HfHubHTTPError, repo_id: str) -> RequestError | WorkError:
    status = error.response.status_code
    message = (error.server_message or "").strip().rstrip(".")
    details = f"{status}: {message}" if message else str(status)
    if status == 401:
        return RequestError(
            "The hub refuses the token (401). Set HF_TOKEN to a valid one (https://huggingface.co/settings/tokens)."
        )
    if status == 403:
        return RequestError(
            f"The token may not write to {repo_id} ({details}). Use a token that may write there, or another owner: "
            "--repo owner/name."
        )
    if status == 400:
        return RequestError(f"The hub refuses the request for {repo_id} ({details}). Correct the name or the recipe.")
    return WorkError(
        f"The hub failed while {repo_id} was published ({details}). Run the command again: nothing is visible before the "
        "last step."
    )


def check_secrets(dataset: DatasetDict, masked: bool) -> None:
    """Refuse a dataset with rows in which credentials were found and not masked.

    Args:
        dataset: with the table `findings` (columns `id`, `source`, `rule`, `detail`), if the rules found something.
        masked: whether the rule `secret` masks the credentials that it finds.

    Raises:
        RequestError: the dataset has such rows.
    """
    if masked or "findings" not in dataset:
        return
    found = [row for row in dataset["findings"] if row["rule"] == "secret"]
    if found:
        places = ", ".join(dict.fromkeys(row["source"] for row in found[:3]))
        raise RequestError(
            f"Credentials were found in {len(found)} places and not masked (the first: {places}). What is published cannot "
            "be withdrawn. Set data.rules.secret to mask or drop and make the dataset again, or pass --allow-secrets if "
            "they are not credentials."
        )


def public_rows(dataset: DatasetDict, places: Sequence[str]) -> DatasetDict:
    """The splits without the folders of this machine in the columns `source`, `origin` and `document`, and without the names of
    people in `origin`.

    Args:
        places: the recipe's model, documents and datasets; paths among them are shortened to their names.
    """
    # If the recipe says `~/docs/`, the rows name files below the expanded folder.
    forms = {form for place in places for form in (place.rstrip("/"), str(Path(place).expanduser()))}
    hidden = {form: public_name(form) for form in sorted(forms, key=len, reverse=True) if public_name(form) != form}

    def hide(row: dict[str, Any]) -> dict[str, str]:
        texts = {column: str(row[column]) for column in ("source", "origin", "document")}
        for place, name in hidden.items():
            texts = {column: text.replace(place, name) for column, text in texts.items()}
        if texts["origin"].removeprefix(REPEATED).startswith(HUMAN):
            texts["origin"] = HUMAN.rstrip(":")
        return texts

    return DatasetDict({split: dataset[split].map(hide, keep_in_memory=True) for split in SPLITS})


def push_dataset(dataset: DatasetDict, card: str, repo_id: str, private: bool, token: SecretStr | None) -> str:
    """Publish train, validation and test as Parquet with the card, in one commit; returns the dataset's address.

    Other tables of the dataset (quarantine, counts, findings) are not published. The commit removes files below `data/`
    that an earlier push wrote and this push does not. Arguments and errors are those of `publish`.
    """
    with tempfile.TemporaryDirectory(prefix="push-") as folder:
        files: dict[str, bytes | Path] = {"README.md": card.encode()}
        for split in SPLITS:
            file = Path(folder, f"{split}.parquet")
            dataset[split].to_parquet(file)
            files[data_file(split)] = file
        return publish("dataset", files, repo_id, private, token, lambda file: file.startswith("data/"))
