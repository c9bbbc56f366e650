"""Answers from a model behind a network: many at once, each stored when it comes, tried again when it does not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from llm_engineering.config import ClientConfig
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.generation.budget import Budget
from llm_engineering.generation.client import Answer, Failure, Messages, Sampling
from llm_engineering.generation.prompts import read_prompt
from llm_engineering.generation.retries import EndpointRefusedError, RowRefusedError, TryAgainError, retrying
from llm_engineering.generation.store import STORE_FILE, AnswerStore, Reply
from llm_engineering.generation.structured import REPAIRABLE, json_schema, judge, schema_text
from llm_engineering.progress import Progress
from llm_engineering.settings import Settings

logger = logging.getLogger(__name__)

# So many requests given up with no answer between them: the endpoint is down, and the rest would go the same way.
MAX_FAILED_IN_A_ROW = 20
CHECK_RETRIES = 2

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


class _StoppedError(Exception):
    """Another request found out that the run must end."""


class Endpoint:
    """Sends up to `concurrency` requests at once.

    Every reply is stored under the hash of its request before it is looked at, also one that turns out to be of no
    use: a run that is killed and started again asks only for what is missing, and judges the rest as before.
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
        """Answer every request, in order. Only a bad row fails, with its reason.

        Raises:
            WorkError: a cap is reached, the endpoint refuses every request, or does not answer any more. Everything
                received is stored.
        """
        asked = [self._with_schema(messages, sampling) for messages in requests]
        unique = {self._key(messages, sampling): messages for messages in asked}
        stored = sum(key in self.store.answers for key in unique)
        if stored:
            logger.info("%d of %d %s are stored already", stored, len(unique), what)
        outcomes: dict[str, Answer | Failure] = {}
        with self.store:
            asyncio.run(self._run(unique, sampling, outcomes, Progress(what, len(unique) - stored)))
        if self._cause:
            raise WorkError(
                f"{self._cause} Done so far: {len(outcomes)} of {len(unique)} {what}, {self.budget}. Every answer "
                f"received is stored in {self.store.path}, and the same command goes on from there."
            )
        failed = sum(isinstance(o, Failure) and o.reason == "request_failed" for o in outcomes.values())
        if failed and failed == len(outcomes):
            raise WorkError(f"{self.identity} answered none of {failed} requests: {self._last_failure}.")
        if failed:
            logger.warning("%d of %d %s were given up: --no-cache asks for them again", failed, len(unique), what)
        logger.info("%s: %s", what, self.budget)
        return [outcomes[self._key(messages, sampling)] for messages in asked]

    def check_access(self, max_new_tokens: int, json_field: str | None) -> None:
        """Send one small request. Raises RequestError for whatever would end a run at its start."""
        json_field = json_field if self.writes_json else None
        sampling = Sampling(max_new_tokens, self.temperature, json_field=json_field)
        messages = self._with_schema([{"role": "user", "content": read_prompt("check")}], sampling)
        payload = self.transport.payload(messages, sampling, self._schema(sampling))

        async def send() -> Reply:
            async with self.transport.session() as send:
                return await retrying(CHECK_RETRIES, asyncio.sleep)(send, payload)

        try:
            reply = asyncio.run(send())
        except (TryAgainError, RowRefusedError) as error:
            raise RequestError(f"{self.identity} cannot be reached: {error}.") from error
        except EndpointRefusedError as error:
            raise RequestError(str(error)) from error
        outcome = judge(reply, json_field)
        if self._schema(sampling) and isinstance(outcome, Failure) and outcome.reason in REPAIRABLE:
            raise RequestError(
                f"{self.identity} does not keep to a JSON schema: it answered {reply.text[:60]!r}. "
                "Set generation.response_format: prompt, which asks for JSON in words, or text for a small model."
            )
        if self.budget.is_capped and not reply.output_tokens:
            raise RequestError(
                f"{self.identity} reports no usage, so that generation.max_total_tokens and max_cost_usd cannot be "
                "kept. Remove them, or use an endpoint that reports usage."
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
                # Not a TaskGroup, which cancels the others: what they have asked for is paid, and is waited for.
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
            outcome = judge(reply, sampling.json_field)
            if isinstance(outcome, Failure) and outcome.reason in REPAIRABLE:
                repair = read_prompt("repair").format(
                    problem=outcome.detail, schema=schema_text(str(sampling.json_field))
                )
                again = [{"role": "assistant", "content": outcome.text}, {"role": "user", "content": repair}]
                outcome = judge(await self._reply(send, [*messages, *again], sampling), sampling.json_field)
            return outcome
        except RowRefusedError as error:
            return Failure(error.reason, str(error))
        except TryAgainError as error:
            return self._given_up(str(error))

    async def _reply(self, send: Send, messages: Messages, sampling: Sampling) -> Reply:
        """The stored reply, or a new one, which is stored before anything else happens."""
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
                self._end(f"{self.identity} reported no usage, so that the cap cannot be kept.")
        if key not in self._counted:
            self._counted.add(key)
            self.budget.spend(reply)
        return reply

    async def _send(self, send: Send, payload: dict[str, Any]) -> Reply:
        reached = self.budget.reached()
        if reached:
            self._end(f"The cap {reached} is reached: raise it to go on.")
        if self._stop.is_set():
            raise _StoppedError
        return await send(payload)

    async def _sleep(self, seconds: float) -> None:
        """Wait before another try, but not when the run ends."""
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


def open_endpoint(config: ClientConfig, settings: Settings) -> Endpoint:
    """The endpoint that the recipe names, with the answers it has given before.

    Raises:
        RequestError: there is no key, or no AWS region.
    """
    transport: Transport
    if config.client == "openai":
        from llm_engineering.generation.chat_completions import ChatCompletions

        transport = ChatCompletions(config, settings.openai_api_key)
    else:
        from llm_engineering.generation.bedrock import Bedrock

        transport = Bedrock(config)
    return Endpoint(transport, config, AnswerStore(settings.llm_output_dir / STORE_FILE))
