"""What a client is: it answers requests, in their order, and says of every one whether it came to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llm_engineering.config import ClientConfig, ComputeConfig, ModelConfig
from llm_engineering.settings import Settings

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; 1 draws from the model's own distribution; None leaves it
            to the endpoint.
        seed: another seed is another answer, where the temperature allows one.
        stop: strings that end an answer of the local model; they stay in it.
        json_field: the answer is asked for as a JSON object with this one text field, whose value is the answer.
            For clients that write JSON.
    """

    max_new_tokens: int
    temperature: float | None = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_field: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was asked for."""

    text: str


@dataclass(frozen=True)
class Failure:
    """Why there is no answer: a short `reason` that counts group by, what exactly was wrong, and the raw text."""

    reason: str
    detail: str
    text: str = ""


class Client(Protocol):
    """Answers requests with one model.

    Attributes:
        identity: the model, and what else its answers depend on besides the request.
        writes_json: whether `Sampling.json_field` is understood.
        temperature: of what is written for the dataset; rejected answers have one of their own.
    """

    identity: str
    writes_json: bool
    temperature: float | None

    def answer(self, requests: Sequence[Messages], sampling: Sampling, what: str) -> Sequence[Answer | Failure]:
        """Answer every request, in order. `what` is made, for the progress line, e.g. `questions`."""
        ...


def open_client(
    config: ClientConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    settings: Settings,
    chat_template: str | None = None,
) -> Client:
    """The client that the recipe names, with the answers it has given before.

    Args:
        chat_template: for the model in this process, as `formatting.chat_template`; endpoints have their own.
    """
    # Each client's libraries are imported only where it is used.
    if config.client == "local":
        from llm_engineering.generation.local import open_local_model

        return open_local_model(model, compute, config.batch_size, settings, chat_template)
    from llm_engineering.generation.endpoint import open_endpoint

    return open_endpoint(config, settings)


def check_access(config: ClientConfig, settings: Settings, max_new_tokens: int, json_field: str | None) -> None:
    """Send an endpoint one small request like those of the run, so that what is wrong is known before any work.

    Raises:
        RequestError: no key or region, an endpoint that cannot be reached, refuses the key or the request, does not
            know the model, does not keep to a JSON schema, or reports no usage where a cap needs it.
    """
    if config.client != "local":
        from llm_engineering.generation.endpoint import open_endpoint

        open_endpoint(config, settings).check_access(max_new_tokens, json_field)
