"""Sends requests to a model over the network, many at a time, stores each reply at once, and repeats failed requests.

It also limits the tokens and the cost of a run (`Budget`), and reads answers that are JSON with one text field.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.generation.clients.retries import EndpointRefusedError, RowRefusedError, TryAgainError, retrying
from llm_engineering.generation.prompts import read_prompt
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Answer, Failure, Messages, Reply, Sampling, Send, Transport
from llm_engineering.progress import Progress
from llm_engineering.recipe.generation_blocks import ClientConfig


class Budget:
    """Counts tokens and money against the caps of the recipe."""

    def __init__(self, config: ClientConfig) -> None:
        self.max_tokens = config.max_total_tokens
        self.max_usd = config.max_cost_usd
        self.prices = config.prices
        self.input_tokens = 0
        self.output_tokens = 0

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    @property
    def usd(self) -> float | None:
        """The cost of these tokens; None if the recipe has no prices."""
        if self.prices is None:
            return None
        return (
            self.input_tokens * self.prices.input_per_million + self.output_tokens * self.prices.output_per_million
        ) / 1e6

    @property
    def is_capped(self) -> bool:
        """Whether the recipe sets a cap on tokens or cost."""
        return self.max_tokens is not None or self.max_usd is not None

    def spend(self, reply: Reply) -> None:
        """Count a reply, new or stored."""
        self.input_tokens += reply.input_tokens
        self.output_tokens += reply.output_tokens

    def reached(self) -> str:
        """The cap that is reached, as `key value`, or an empty string."""
        if self.max_tokens is not None and self.tokens >= self.max_tokens:
            return f"generation.max_total_tokens {self.max_tokens}"
        if self.max_usd is not None and self.usd is not None and self.usd >= self.max_usd:
            return f"generation.max_cost_usd {self.max_usd}"
        return ""

    def __str__(self) -> str:
        cost = "" if self.usd is None else f", ${self.usd:.2f}" if self.usd >= 1 else f", ${self.usd:.4f}"
        return f"{self.tokens:,} tokens{cost}"


REPAIRABLE = ("bad_json", "wrong_schema")
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?\s*```\Z", re.DOTALL)


@cache
def _model(field: str) -> type[BaseModel]:
    return create_model("Written", __config__=ConfigDict(extra="forbid"), **{field: (str, ...)})  # type: ignore[call-overload,no-any-return]


def json_schema(field: str) -> dict[str, Any]:
    """The schema of an object with one text field and nothing else."""
    return {
        "type": "object",
        "properties": {field: {"type": "string"}},
        "required": [field],
        "additionalProperties": False,
    }


def schema_text(field: str) -> str:
    """The schema as prompts show it."""
    return json.dumps(json_schema(field))


def read_reply(reply: Reply, field: str | None) -> Answer | Failure:
    """Turn a reply into an answer or a failure. This never raises an exception, whatever the text is.

    Args:
        field: the text field of the requested JSON; None if the answer is plain text.
    """
    text = reply.text.strip()
    if reply.finish == "refused":
        return Failure("refused", "the model or the endpoint's filter refused to answer", text)
    if reply.finish == "length":
        return Failure("truncated_answer", f"cut off after {reply.output_tokens} tokens", text)
    if not text:
        return Failure("empty_answer", "the answer has no text")
    if field is None:
        return Answer(text)
    fenced = _FENCED.match(text)
    try:
        value = getattr(_model(field).model_validate_json(fenced[1] if fenced else text), field)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        reason = "bad_json" if problem["type"] == "json_invalid" else "wrong_schema"
        place = ".".join(map(str, problem["loc"]))
        return Failure(reason, f"{f'{place}: ' if place else ''}{problem['msg']}", text)
    value = value.strip()
    return Answer(value) if value else Failure("empty_answer", f"`{field}` has no text", text)


logger = logging.getLogger(__name__)

# If this many requests in a row fail after all their retries, the endpoint is taken to be down, and the run ends.
MAX_FAILED_IN_A_ROW = 20
CHECK_RETRIES = 2


class _StoppedError(Exception):
    """Ends a worker because another one found that the run must end."""


class Endpoint:
    """Sends up to `concurrency` requests at once.

    Every reply is stored under the hash of its request before it is judged, even if it turns out to be unusable. So a
    run that is killed and started again sends only the missing requests, and judges the stored replies as before.
    """

    def __init__(self, transport: Transport, config: ClientConfig, store: AnswerStore) -> None:
        self.transport = transport
        self.config = config
        self.store = store
        self.identity = transport.identity
        self.writes_json = config.response_format != "text"
        self.temperature = config.temperature
        self.budget = Budget(config)
        self._stop: asyncio.Event
        self._cause = ""
        self._failed_in_a_row = 0
        self._last_failure = ""
        self._counted: set[str] = set()

    def answer(self, requests: Sequence[Messages], sampling: Sampling, what: str) -> list[Answer | Failure]:
        """Answer every request, in order. A request that cannot be answered gives a `Failure` with its reason.

        Raises:
            WorkError: a cap is reached, or the endpoint refuses every request or stops answering. All replies received so
                far are stored.
        """
        complete = [self._with_schema(messages, sampling) for messages in requests]
        unique = {self._key(messages, sampling): messages for messages in complete}
        stored = sum(key in self.store.answers for key in unique)
        if stored:
            logger.info("%d of %d %s are already stored", stored, len(unique), what)
        outcomes: dict[str, Answer | Failure] = {}
        with self.store:
            asyncio.run(self._run(unique, sampling, outcomes, Progress(what, len(unique) - stored)))
        if self._cause:
            raise WorkError(
                f"{self._cause} Done so far: {len(outcomes)} of {len(unique)} {what}, {self.budget}. Every answer "
                f"received is stored in {self.store.path}. Run the same command to continue from there."
            )
        failed = sum(isinstance(o, Failure) and o.reason == "request_failed" for o in outcomes.values())
        if failed and failed == len(outcomes):
            raise WorkError(
                f"{self.identity} answered none of {failed} requests: {self._last_failure}. Check that the endpoint works, and "
                "run the same command again."
            )
        if failed:
            logger.warning(
                "%d of %d %s failed after all retries. Add --no-cache to request them again", failed, len(unique), what
            )
        logger.info("%s: %s", what, self.budget)
        return [outcomes[self._key(messages, sampling)] for messages in complete]

    def check_access(self, max_new_tokens: int, json_field: str | None) -> None:
        """Send one small request, to find errors that would end a run at its start.

        Raises:
            RequestError: the endpoint cannot be reached, refuses the request, does not follow the JSON schema, or reports no
                usage although the recipe sets a cap.
        """
        json_field = json_field if self.writes_json else None
        sampling = Sampling(max_new_tokens, self.temperature, json_field=json_field)
        messages = self._with_schema([{"role": "user", "content": read_prompt("check")}], sampling)
        payload = self.transport.payload(messages, sampling, self._schema(sampling))

        async def send() -> Reply:
            async with self.transport.session() as send:
                return await retrying(CHECK_RETRIES, asyncio.sleep)(send, payload)

        try:
            reply = asyncio.run(send())
        except TryAgainError as error:
            raise RequestError(f"{self.identity} cannot be reached: {error}.") from error
        except RowRefusedError as error:
            raise RequestError(
                f"{self.identity} refuses a short request for {max_new_tokens} tokens: {error}."
            ) from error
        except EndpointRefusedError as error:
            raise RequestError(str(error)) from error
        outcome = read_reply(reply, json_field)
        if self._schema(sampling) and isinstance(outcome, Failure) and outcome.reason in REPAIRABLE:
            raise RequestError(
                f"{self.identity} does not follow a JSON schema: it answered {reply.text[:60]!r}. "
                "Set generation.response_format: prompt, which describes the JSON in the prompt, or text for a small model."
            )
        if self.budget.is_capped and not reply.output_tokens:
            raise RequestError(
                f"{self.identity} reports no usage, so generation.max_total_tokens and max_cost_usd cannot be enforced. "
                "Remove them, or use an endpoint that reports usage."
            )

    async def _run(
        self, unique: dict[str, Messages], sampling: Sampling, outcomes: dict[str, Answer | Failure], progress: Progress
    ) -> None:
        self._stop = asyncio.Event()
        waiting = iter(unique.items())
        async with self.transport.session() as send:
            workers = [
                asyncio.create_task(self._work(waiting, send, sampling, outcomes, progress))
                for _ in range(min(self.config.concurrency, len(unique)))
            ]
            try:
                # Not a TaskGroup, which would cancel the other workers: their requests are already paid for, so their
                # replies are awaited and stored.
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    async def _work(
        self,
        waiting: Iterator[tuple[str, Messages]],
        send: Send,
        sampling: Sampling,
        outcomes: dict[str, Answer | Failure],
        progress: Progress,
    ) -> None:
        for key, messages in waiting:
            is_new = key not in self.store.answers
            try:
                outcomes[key] = await self._ask(send, messages, sampling)
            except _StoppedError:
                return
            if is_new:
                progress.advance(note=str(self.budget))

    async def _ask(self, send: Send, messages: Messages, sampling: Sampling) -> Answer | Failure:
        try:
            reply = await self._reply(send, messages, sampling)
            outcome = read_reply(reply, sampling.json_field)
            if isinstance(outcome, Failure) and outcome.reason in REPAIRABLE:
                repair = read_prompt("repair").format(
                    problem=outcome.detail, schema=schema_text(str(sampling.json_field))
                )
                again = [{"role": "assistant", "content": outcome.text}, {"role": "user", "content": repair}]
                outcome = read_reply(await self._reply(send, [*messages, *again], sampling), sampling.json_field)
            return outcome
        except RowRefusedError as error:
            return Failure(error.reason, str(error))
        except TryAgainError as error:
            return self._given_up(str(error))

    async def _reply(self, send: Send, messages: Messages, sampling: Sampling) -> Reply:
        """Return the stored reply, or get a new one and store it before anything else happens."""
        key = self._key(messages, sampling)
        if key in self.store.answers:
            reply = self.store.answers[key]
        else:
            payload = self.transport.payload(messages, sampling, self._schema(sampling))
            try:
                reply = await retrying(self.config.max_retries, self._sleep)(self._send, send, payload)
            except EndpointRefusedError as error:
                self._end(str(error))
                raise _StoppedError from error
            self.store.add({key: reply})
            self._failed_in_a_row = 0
            if self.budget.is_capped and not reply.output_tokens and reply.text:
                self._end(f"{self.identity} reported no usage, so the cap cannot be enforced: remove the cap.")
        if key not in self._counted:
            self._counted.add(key)
            self.budget.spend(reply)
        return reply

    async def _send(self, send: Send, payload: dict[str, Any]) -> Reply:
        reached = self.budget.reached()
        if reached:
            self._end(f"The cap {reached} is reached: raise it to continue.")
        if self._stop.is_set():
            raise _StoppedError
        return await send(payload)

    async def _sleep(self, seconds: float) -> None:
        """Wait before the next try, but stop waiting if the run ends."""
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return
        raise _StoppedError

    def _given_up(self, cause: str) -> Failure:
        self._failed_in_a_row += 1
        self._last_failure = cause
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            self._end(f"{self.identity} answered none of the last {self._failed_in_a_row} requests: {cause}.")
        return Failure("request_failed", f"{cause}, after {self.config.max_retries} retries")

    def _end(self, cause: str) -> None:
        self._cause = self._cause or cause
        self._stop.set()

    def _schema(self, sampling: Sampling) -> dict[str, Any] | None:
        if sampling.json_field is None or self.config.response_format == "prompt":
            return None
        return json_schema(sampling.json_field)

    def _with_schema(self, messages: Messages, sampling: Sampling) -> Messages:
        if sampling.json_field is None or self.config.response_format != "prompt":
            return messages
        words = read_prompt("json").format(field=sampling.json_field, schema=schema_text(sampling.json_field))
        return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n\n{words}"}]

    def _key(self, messages: Messages, sampling: Sampling) -> str:
        payload = self.transport.payload(messages, sampling, self._schema(sampling))
        drawn_with = sampling.seed if sampling.temperature != 0 else 0
        return hashlib.sha256(json.dumps([self.identity, drawn_with, payload]).encode()).hexdigest()[:24]
