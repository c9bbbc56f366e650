"""Recipes that do not fit their model, requests to the server, schedules, AWS and the store: what is refused, and what is done."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
import yaml
from botocore.exceptions import ClientError
from torch import nn
from transformers import PreTrainedConfig

from benchmarks.architectures import ARCHITECTURES
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.failures import translated
from llm_engineering.cloud.schedules.cron import parse_timing
from llm_engineering.formatting.render import render
from llm_engineering.models.base_model import check_generation_config
from llm_engineering.models.device import choose_device
from llm_engineering.models.fit import check_fit
from llm_engineering.models.tokenizer import check_rows
from llm_engineering.publish.chat_request import ApiError, read_request
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.policy import new_policy
from llm_engineering.training.processes.ranks import Interruption
from tests.cases.case import CallCase, Case, turns
from tests.tiny_models import CPU, SIZES, Kind, tiny_tokenizer, training_setup, write_model
from tools.zenml_store import check_database

LOCAL = Path(__file__).resolve().parents[2] / "configs" / "local.yaml"
UNPACKED = ("cpt.packing=false", "sft.packing=false")


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of an architecture, with changes."""
    class_name, shape = ARCHITECTURES[name]
    made: PreTrainedConfig = getattr(transformers, class_name)(
        **{"vocab_size": 300, "pad_token_id": None, **shape, **changes}
    )
    return made


def judged(name: str, *overrides: str, **changes: Any) -> nn.Module:
    """Check `configs/local.yaml` with some keys changed against a model."""
    return check_fit(load_recipe(LOCAL, ["model.name_or_path=my/model", *overrides]), config_of(name, **changes))


def checked(*arguments: str, **changes: Any) -> Callable[[], str]:
    """A call that says whether a recipe fits a model."""

    def call() -> str:
        judged(*arguments, **changes)
        return "fits"

    return call


def adapted(folder: Path, **lora: Any) -> str:
    """Whether an adapter fits a Llama whose embeddings are tied."""
    base = write_model(folder / "model", Kind(transformers.LlamaConfig, SIZES | {"tie_word_embeddings": True}))
    settings = Settings(_env_file=None, llm_cache_dir=folder / "cache")
    new_policy(training_setup(base).model, LoraConfig(r=4, **lora), settings, choose_device(CPU))
    return "fits"


def with_a_token_more() -> str:
    """Whether a tokenizer with one token more than the embedding has rows is accepted."""
    tokenizer = tiny_tokenizer(("<|endoftext|>",), None)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    check_rows(tokenizer, rows)
    return "accepted"


def generation_settings(folder: Path) -> str:
    """Whether a base model is accepted whose generation_config.json has a temperature and no sampling."""
    base = write_model(folder / "model", "llama")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    check_generation_config(training_setup(base).model, Settings(_env_file=None, llm_cache_dir=folder / "cache"))
    return "accepted"


def asked(**changes: Any) -> Callable[[], str]:
    """A call that sends a request, and says which parameter is refused, or how many tokens the answer may have."""

    def call() -> str:
        try:
            request = read_request(json.dumps({"model": "m", "messages": turns("Who?"), **changes}).encode())
        except ApiError as error:
            return f"{error.status} {error.code}: {error.param}"
        return f"at most {request.max_new_tokens} tokens"

    return call


def next_time(text: str, zone: str, after: datetime) -> Callable[[], str]:
    """A call that says when a schedule fires next."""
    return lambda: parse_timing(text, zone, after).next_times(after, 1)[0].isoformat()


def bucket(name: str) -> str:
    """The place of results in a bucket."""
    known = {"aws_region": "eu-west-1", "sagemaker_role": "arn:aws:iam::123456789012:role/training"}
    settings = Settings(_env_file=None, sagemaker_bucket=name, sagemaker_image="i", **known)
    return Account.resolve(SageMakerConfig(instance_type="ml.g5.2xlarge"), settings).uri("results")


def prefix(text: str) -> str:
    """Whether a prefix is accepted."""
    try:
        return SageMakerConfig(instance_type="ml.g5.2xlarge", prefix=text).prefix
    except ValueError:
        return "refused"


def named(name: str) -> Callable[[], str]:
    """A call that reads a recipe of this name."""
    return lambda: load_recipe(LOCAL, [f"name={name}"]).name


def wrong_clock() -> str:
    """What is said if AWS refuses the time of this machine."""
    error = ClientError({"Error": {"Code": "RequestTimeTooSkewed", "Message": "Too skewed"}}, "PutObject")
    with translated("The files cannot be uploaded"):
        raise error
    return "nothing"


def closed_terminal() -> str:
    """What a closed terminal does to a run in training."""
    with Interruption() as interruption, mock.patch.object(os, "write"):
        os.kill(os.getpid(), signal.SIGHUP)
        return f"{interruption.received.name}: a checkpoint is saved" if interruption.received else "nothing"


def variables(folder: Path) -> str:
    """The first variable of an `.env` as Windows writes it."""
    (folder / ".env").write_bytes(b"\xef\xbb\xbfSAGEMAKER_BUCKET=my-bucket\r\nAWS_REGION=eu-west-1\r\n")
    with mock.patch.dict(os.environ):
        os.environ.pop("SAGEMAKER_BUCKET", None)
        return str(Settings(_env_file=folder / ".env").sagemaker_bucket)


def recipe_of_windows(folder: Path) -> str:
    """The name in a recipe as Windows writes it."""
    text = f"extends: {LOCAL}\r\nname: mine\r\n"
    (folder / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return load_recipe(folder / "mine.yaml").name


def damaged_database(folder: Path) -> str:
    """What is said of ZenML's database if a half of it is lost."""
    connection = sqlite3.connect(folder / "zenml.db")
    connection.execute("CREATE TABLE runs (name TEXT)")
    connection.executemany("INSERT INTO runs VALUES (?)", [("a" * 500,) for _ in range(100)])
    connection.commit()
    connection.close()
    content = (folder / "zenml.db").read_bytes()
    (folder / "zenml.db").write_bytes(content[: len(content) // 2])
    (folder / "config.yaml").write_text(yaml.safe_dump({"store": {"url": f"sqlite:///{folder / 'zenml.db'}"}}))
    with mock.patch.dict(os.environ, {"ZENML_CONFIG_PATH": str(folder)}):
        check_database()
    return "accepted"


MODELS: list[Case] = [
    CallCase(
        "names of layers that the model does not have",
        checked("Phi-3", "cpt.lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"),
        "q_proj, k_proj, v_proj is no name of a module of this model",
        before="only o_proj is trained, and nothing is said",
    ),
    CallCase(
        "two names of layers in one text",
        lambda folder: adapted(folder, target_modules="q_proj,v_proj"),
        "regular expression for whole names, and it matches no layer",
        before="told after the data was generated",
    ),
    CallCase(
        "a tokenizer with more tokens than the embedding has rows",
        with_a_token_more,
        "has 1 tokens without a row",
        before="trains, and the merge fails",
    ),
    CallCase(
        "a model without the attention of the recipe",
        checked("BLOOM", *UNPACKED, "compute.attn_implementation=sdpa"),
        "is sdpa, which my/model (bloom) does not have",
        before="found after the data was generated",
    ),
    CallCase("a model without sdpa, with attention auto", checked("gpt-oss"), "fits", before="gpt-oss has no sdpa"),
    CallCase(
        "rows longer than the learned positions",
        checked("GPT-2", "formatting.max_length=500"),
        "Lower formatting.max_length to 488",
        before="IndexError in the evaluation",
    ),
    CallCase(
        "a base model that is quantised",
        checked("Qwen2", quantization_config={"quant_method": "awq", "bits": 4}),
        "are quantised",
        before="found after the data was generated",
    ),
    CallCase(
        "generation settings that transformers cannot save",
        generation_settings,
        "accepted",
        before="the first checkpoint of a full fine-tune fails",
    ),
]

REQUESTS: list[Case] = [
    CallCase("max_completion_tokens", asked(max_completion_tokens=5), "at most 5 tokens", before="1,024 tokens"),
    CallCase("two answers to one request", asked(n=2), "400 unsupported_value: n", before="one answer"),
    CallCase("log-probabilities", asked(logprobs=True), "400 unsupported_value: logprobs", before="ignored"),
    CallCase(
        "answers in JSON",
        asked(response_format={"type": "json_object"}),
        "400 unsupported_value: response_format",
        before="ignored",
    ),
    CallCase("no messages", asked(messages=[]), "400 invalid_value: messages", before="500"),
    CallCase("a name with two hyphens", named("my--model"), "cannot be the name of a model", before="my--model"),
    CallCase("a name that ends with a full stop", named("v1."), "cannot be the name of a model", before="v1."),
    CallCase(
        "a batch without a row that can be rendered",
        lambda: f"{len(render([], tiny_tokenizer(('<|endoftext|>',), '{{ messages }}')))} rows",
        "0 rows",
        before="IndexError: list index out of range",
    ),
]

MACHINES: list[Case] = [
    CallCase(
        "the last day of the week",
        next_time("0 3 ? * L *", "UTC", datetime(2031, 5, 1, tzinfo=UTC)),
        "2031-05-03T03:00:00+00:00",
        before="never fires",
    ),
    CallCase(
        "a time that summer time skips",
        next_time("30 2 * * ? *", "Europe/Berlin", datetime(2031, 3, 29, 12, tzinfo=UTC)),
        "2031-03-31T02:30:00+02:00",
    ),
    CallCase("a bucket with a blank", lambda: bucket(" my-bucket"), "is not a bucket name", before="s3:// my-bucket/…"),
    CallCase("a bucket as an address", lambda: bucket("s3://my-bucket"), "is not a bucket name"),
    CallCase("a prefix with an empty folder", lambda: prefix("a//b"), "refused", before="a//b"),
    CallCase(
        "the clock of this machine is wrong",
        wrong_clock,
        "The clock of this machine is wrong",
        before="`make preflight` checks everything that a job needs",
    ),
    CallCase("a closed terminal", closed_terminal, "SIGHUP: a checkpoint is saved", before="the run ends without one"),
    CallCase("the first variable of an .env of Windows", variables, "my-bucket"),
    CallCase("a recipe of Windows", recipe_of_windows, "mine"),
    CallCase("a database that is cut off", damaged_database, "is damaged", before="raw SQL"),
]
