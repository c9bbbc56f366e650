"""Publishing on a hub on loopback: the requests, and a message with a remedy for each refusal."""

import io
import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from pydantic import SecretStr

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.publish.hub import check_secrets, public_rows, publish, push_dataset
from tests.fakes.hub import Repo, running_hub
from tools.model_versions.handover import _is_ours

TOKEN = SecretStr("hf_planted")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(TOKEN.get_secret_value()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        yield served


def part(*numbers, origin="human"):
    return rows_dataset(
        [
            InstructionRow(
                prompt=[Message(role="user", content=f"What is {n}?")],
                completion=[Message(role="assistant", content=f"{n} is a number.")],
                source="rows.jsonl:line 1",
                origin=origin,
                document="/home/someone/docs/numbers.md",
            )
            for n in numbers
        ],
        "instruction",
    )


@pytest.fixture
def dataset():
    quarantine = Dataset.from_dict({"reason": ["empty_answer"], "text": ["set aside"]})
    return DatasetDict(train=part(1, 2, 3), validation=part(4), test=part(5), quarantine=quarantine)


def test_splits_and_card_are_published_in_one_commit_to_a_private_repository(hub, dataset):
    url = push_dataset(dataset, "# Card", "someone/rows", private=True, token=TOKEN)
    assert url == f"{hub.url}/datasets/someone/rows"
    assert hub.sent("POST", "/api/repos/create") == [
        {"name": "rows", "organization": "someone", "visibility": "private", "type": "dataset"}
    ]
    files = ["README.md", "data/test.parquet", "data/train.parquet", "data/validation.parquet"]
    repo = hub.repos["someone/rows"]
    assert repo.commits == [{"written": files, "removed": []}]
    assert repo.private
    for split in ("train", "validation", "test"):
        assert pq.read_table(io.BytesIO(repo.files[f"data/{split}.parquet"])).to_pylist() == dataset[split].to_list()


def test_public_only_when_asked(hub, dataset):
    push_dataset(dataset, "# Card", "someone/rows", private=False, token=TOKEN)
    assert hub.sent("POST", "/api/repos/create")[0]["visibility"] == "public"


def test_a_second_push_removes_files_that_are_no_longer_written(hub, dataset):
    hub.repos["someone/rows"] = Repo(True, {"data/old.parquet": b"x", "LICENSE": b"x", "README.md": b"x"})
    push_dataset(dataset, "# Card", "someone/rows", private=True, token=TOKEN)
    repo = hub.repos["someone/rows"]
    assert repo.commits[0]["removed"] == ["data/old.parquet"]
    assert repo.files["README.md"] == b"# Card"
    assert repo.files["LICENSE"] == b"x"
    assert hub.sent("POST", "/api/repos/create") == []


def test_only_model_files_of_an_earlier_push_are_removed(hub):
    former = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "own.gguf", "LICENSE", "data/a.json")
    hub.repos["someone/model"] = Repo(True, dict.fromkeys(former, b"x"))
    files = {"model.safetensors": b"new", "config.json": b"{}", "README.md": b"# Card"}
    publish("model", files, "someone/model", private=True, token=TOKEN, is_ours=_is_ours)
    assert hub.repos["someone/model"].commits == [{"written": sorted(files), "removed": list(former[:2])}]


@pytest.mark.parametrize(
    ("is_private", "asked_private", "words"),
    [(False, True, "exists and is public, and the dataset was to be private"),
     (True, False, "exists and is private, and the dataset was to be public")],
)  # fmt: skip
def test_the_visibility_of_an_existing_repository_is_never_changed(hub, dataset, is_private, asked_private, words):
    hub.repos["someone/rows"] = Repo(is_private)
    with pytest.raises(RequestError, match=words):
        push_dataset(dataset, "# Card", "someone/rows", private=asked_private, token=TOKEN)
    assert hub.repos["someone/rows"].commits == []


@pytest.mark.parametrize("name", ["rows", "a/b/c", "some one/rows", "someone/rows.git", ""])
def test_an_invalid_name_of_a_repository_is_refused(hub, dataset, name):
    with pytest.raises(RequestError, match="owner|not a name of a repository"):
        push_dataset(dataset, "# Card", name, private=True, token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("path", "status", "said", "error", "words"),
    [
        ("/api/repos/create", 403, "You don't have the rights", RequestError, "may not write to someone/rows (403: You"),
        ("/commit/main", 403, "Forbidden", RequestError, "Use a token that may write there"),
        ("/api/validate-yaml", 400, "license: unknown", RequestError, "refuses the card: Invalid metadata in README.md"),
        ("/api/repos/create", 400, "Bad name", RequestError, "refuses the request for someone/rows (400: Bad name)"),
        ("/api/repos/create", 500, "Oops", WorkError, "failed while someone/rows was published (500"),
    ],
)  # fmt: skip
def test_refusals_name_the_remedy(hub, dataset, path, status, said, error, words):
    hub.failures[path] = (status, said)
    with pytest.raises(error) as raised:
        push_dataset(dataset, "# Card", "someone/rows", private=True, token=TOKEN)
    assert words in str(raised.value)
    assert TOKEN.get_secret_value() not in str(raised.value)


def test_a_wrong_token(hub, dataset):
    with pytest.raises(RequestError, match="refuses the token"):
        push_dataset(dataset, "# Card", "someone/rows", private=True, token=SecretStr("hf_other"))


def test_no_token(hub, dataset):
    with pytest.raises(RequestError, match="There is no token.*Set HF_TOKEN"):
        push_dataset(dataset, "# Card", "someone/rows", private=True, token=None)
    assert hub.requests == []


def test_no_network(hub, dataset, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WorkError, match="http://127.0.0.1:9 cannot be reached"):
        push_dataset(dataset, "# Card", "someone/rows", private=True, token=TOKEN)


def test_offline(hub, dataset, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE is set"):
        push_dataset(dataset, "# Card", "someone/rows", private=True, token=TOKEN)


def findings(*rules):
    return Dataset.from_list([{"id": "1", "source": f"a.jsonl:line {i}", "rule": r, "detail": ""}
                              for i, r in enumerate(rules, 1)])  # fmt: skip


def test_unmasked_credentials_are_refused(dataset):
    dataset["findings"] = findings("personal_data", "secret", "secret")
    with pytest.raises(RequestError, match="found in 2 places.*a.jsonl:line 2, a.jsonl:line 3.*--allow-secrets"):
        check_secrets(dataset, masked=False)
    check_secrets(dataset, masked=True)


def test_other_findings_are_published(dataset):
    check_secrets(dataset, masked=False)
    dataset["findings"] = findings("personal_data", "length_outlier")
    check_secrets(dataset, masked=False)


def test_the_names_of_people_are_not_published(dataset):
    for origin in ("human:Ada", "again: human:Ada"):
        dataset["train"] = part(1, 2, origin=origin)
        assert set(public_rows(dataset, [])["train"]["origin"]) == {"human"}
    dataset["train"] = part(1, 2, origin="a human: the user")
    assert set(public_rows(dataset, [])["train"]["origin"]) == {"a human: the user"}


def test_folders_of_this_machine_are_removed_and_nothing_else_changes(dataset):
    dataset["train"] = part(1, 2, origin="question by /srv/models/tiny@folder-1 in float32, answer from the document")
    rows = public_rows(dataset, ["/srv/models/tiny", "/home/someone/docs/", "embedded:python-reference", "."])
    assert set(rows) == {"train", "validation", "test"}
    assert rows["train"]["origin"][0] == "question by tiny@folder-1 in float32, answer from the document"
    assert set(rows["train"]["document"]) == {"docs/numbers.md"}
    assert "/srv" not in json.dumps(rows["train"].to_list())
    for column in ("id", "prompt", "completion", "source"):
        assert rows["train"][column] == dataset["train"][column]
    assert rows["train"].features == dataset["train"].features
