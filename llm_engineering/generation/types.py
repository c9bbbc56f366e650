"""Types that clients and writers share: requests, answers, failures, and the interface of a client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How a model generates its answers.

    Attributes:
        temperature: 0 is greedy decoding, 1 samples from the model's own distribution, None takes the endpoint's
            default.
        seed: with a temperature above 0, each seed gives different answers.
        stop: strings that end an answer of the local model. An answer includes the string, a completion does not.
        json_field: ask for a JSON object with only this text field, and take its value as the answer. Used with
            clients that write JSON.
    """

    max_new_tokens: int
    temperature: float | None = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_field: str | None = None


@dataclass(frozen=True)
class Answer:
    """The usable text of a reply.

    Attributes:
        is_cut: whether the local model reached the maximum length before it ended its answer.
    """

    text: str
    is_cut: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer.

    Attributes:
        reason: a short name, by which failures are counted.
        detail: what exactly was wrong.
        text: the raw text of the reply, if there was one.
    """

    reason: str
    detail: str
    text: str = ""


class Client(Protocol):
    """Answers requests with one model.

    Attributes:
        identity: the model, and everything else besides the request that its answers depend on.
        writes_json: whether the client supports `Sampling.json_field`.
        temperature: for instructions and their answers. Rejected answers have their own temperature.
    """

    identity: str
    writes_json: bool
    temperature: float | None

    def answer(self, requests: Sequence[Messages], sampling: Sampling, what: str) -> Sequence[Answer | Failure]:
        """Answer every request, in order. Progress lines count `what`, e.g. `questions`."""
        ...


@runtime_checkable
class Completer(Protocol):
    """Continues texts with one model, without a chat template.

    Attributes:
        identity: the model, and everything else besides the text that its completions depend on.
    """

    identity: str

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, what: str, banned: Sequence[Sequence[str]] = ()
    ) -> Sequence[Answer]:
        """Continue every text, in order, up to a stop string of `sampling`. Progress lines count `what`.

        Args:
            banned: for each text, words that its completion may not have; no text has any if it is empty.
        """
        ...


@dataclass(frozen=True)
class Reply:
    """A model's reply.

    Attributes:
        finish: `stop`, `length` (the reply was cut at its maximum length) or `refused`; `end` if the local model ended its
            answer and was given no stop string.
        input_tokens, output_tokens: the token usage that an endpoint reports; 0 for the local model.
    """

    text: str
    finish: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0


Send = Callable[[dict[str, Any]], Awaitable[Reply]]


class Transport(Protocol):
    """One kind of endpoint: builds its requests and sends them.

    Attributes:
        identity: the model and the endpoint's address.
    """

    identity: str

    def payload(self, messages: Messages, sampling: Sampling, schema: dict[str, Any] | None) -> dict[str, Any]:
        """The request as it is sent, without secrets."""
        ...

    def session(self) -> AbstractAsyncContextManager[Send]:
        """Open connections for one run. Sending raises only TryAgainError, RowRefusedError or EndpointRefusedError."""
        ...
