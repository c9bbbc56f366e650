"""Short records, and how tests of formats read them."""

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.recipe.data_blocks import DataConfig
from tests.unit.data.written import write

SYSTEM = {"role": "system", "content": "Be brief"}
ANSWER = {"role": "assistant", "content": "Yo"}


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def gpt(*contents):
    return [{"from": ["human", "gpt"][i % 2], "value": content} for i, content in enumerate(contents)]


def opened(tmp_path, records, kind="instruction", name="rows.jsonl", **config):
    dataset = open_dataset(str(write(tmp_path / name, records)), kind, DataConfig(**config))
    return dataset.format, list(dataset.rows)


def texts_of(messages):
    return [f"{message.role[0]}:{message.content}" for message in messages]
