"""The types that clients and writers share: requests, answers, failures, and what a client has to provide."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Reply:
    """What a model sent back.

    Attributes:
        text: the raw text.
        finish: `stop`, `length` (it reached the longest answer), or `refused`.
        input_tokens, output_tokens: what it cost; 0 for the local model.
    """

    text: str
    finish: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0


Send = Callable[[dict[str, Any]], Awaitable[Reply]]


class Transport(Protocol):
    """One kind of endpoint: how a request looks, and how it is sent.

    Attributes:
        identity: the model and where it is.
    """

    identity: str

    def payload(self, messages: Messages, sampling: Sampling, schema: dict[str, Any] | None) -> dict[str, Any]:
        """The request as it is sent, without secrets."""
        ...

    def session(self) -> AbstractAsyncContextManager[Send]:
        """Connections for one run. What is sent raises TryAgainError, RowRefusedError or EndpointRefusedError, and nothing else."""
        ...
