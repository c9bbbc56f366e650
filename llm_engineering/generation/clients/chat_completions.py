"""Client for endpoints with OpenAI's chat completions API: OpenAI, vLLM, Ollama, `transformers serve` and others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import BaseModel, Field, SecretStr, ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.generation.clients.retries import (
    EndpointRefusedError,
    RowRefusedError,
    TryAgainError,
    is_retried,
    retry_after_s,
)
from llm_engineering.generation.types import Messages, Reply, Sampling, Send
from llm_engineering.recipe.generation_blocks import ClientConfig
from llm_engineering.recipe.settings import is_loopback

OPENAI_URL = "https://api.openai.com/v1"
FINISH = {"length": "length", "content_filter": "refused"}


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    """The fields of a chat completion that this client reads."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class ChatCompletions:
    """Builds and sends requests for chat completions.

    Raises:
        RequestError: the key is missing, and the endpoint is not on this machine.
    """

    def __init__(self, config: ClientConfig, key: SecretStr | None) -> None:
        self.url = config.base_url or OPENAI_URL
        self.model = str(config.model)
        self.identity = f"{self.model} at {self.url}"
        self.timeout_s = config.timeout_s
        self.concurrency = config.concurrency
        self.is_loopback = is_loopback(self.url)
        # OpenAI's newer models accept only `max_completion_tokens`, and most other endpoints only `max_tokens`.
        self.limit = "max_completion_tokens" if config.base_url is None else "max_tokens"
        if key is None and not self.is_loopback:
            raise RequestError(
                f"generation.client openai needs a key for {self.url}: set OPENAI_API_KEY in the environment or in .env."
            )
        self._key = key

    def payload(self, messages: Messages, sampling: Sampling, schema: dict[str, Any] | None) -> dict[str, Any]:
        """The body of the request."""
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            self.limit: sampling.max_new_tokens,
        }
        if sampling.temperature is not None:
            payload["temperature"] = sampling.temperature
        if schema is not None:
            named = {"name": "written", "schema": schema, "strict": True}
            payload["response_format"] = {"type": "json_schema", "json_schema": named}
        return payload

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Send]:
        """Open a pool of connections. The client does not retry; retries.py does, for every kind of endpoint."""
        async with AsyncOpenAI(
            api_key=self._key.get_secret_value() if self._key else "none",
            base_url=self.url,
            max_retries=0,
            timeout=self.timeout_s,
            # A proxy from the environment could not reach an endpoint on this machine.
            http_client=DefaultAsyncHttpxClient(trust_env=not self.is_loopback),
        ) as client:

            async def send(payload: dict[str, Any]) -> Reply:
                return await self._send(client, payload)

            yield send

    async def _send(self, client: AsyncOpenAI, payload: dict[str, Any]) -> Reply:
        try:
            # The client's own timeout applies to each read, so an endpoint that sends single bytes would never reach it.
            async with asyncio.timeout(self.timeout_s):
                response = await client.chat.completions.with_raw_response.create(**payload)
        except (TimeoutError, APITimeoutError):
            raise TryAgainError(f"no answer within {self.timeout_s:g} s (generation.timeout_s)") from None
        except APIConnectionError as error:
            raise TryAgainError(f"no connection to {self.url} ({error.__cause__ or error})") from error
        except APIStatusError as error:
            raise self._explained(error) from error
        try:
            completion = _Completion.model_validate_json(response.http_response.content)
        except ValidationError as error:
            raise TryAgainError(f"{self.url} sent an answer that is not a chat completion") from error
        choice, usage = completion.choices[0], completion.usage or _Usage()
        return Reply(
            choice.message.refusal or choice.message.content or "",
            "refused" if choice.message.refusal else FINISH.get(choice.finish_reason or "", "stop"),
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def _explained(self, error: APIStatusError) -> Exception:
        body = error.body if isinstance(error.body, dict) else {}
        status, code = error.status_code, body.get("code")
        message = self._without_key(str(body.get("message") or body.get("detail") or error.message))
        if code == "content_filter":
            return RowRefusedError("refused", f"the endpoint's filter refused the request: {message}")
        # vLLM's code is the status.
        if code == "context_length_exceeded" or "maximum context length" in message:
            return RowRefusedError("too_long", f"the request does not fit into the model's context: {message}")
        if is_retried(status) and code != "insufficient_quota":
            wait = retry_after_s(error.response.headers.get("retry-after"), datetime.now(UTC))
            return TryAgainError(f"status {status}: {message}", wait)
        remedy = {
            401: "Check OPENAI_API_KEY in the environment or in .env",
            403: "The key has no access to this model",
            404: "Check generation.model and generation.base_url, which usually ends in /v1",
            429: "The account has no credit left",
        }.get(status, "The endpoint does not accept the request. Check the keys of the recipe's block generation")
        return EndpointRefusedError(f"{self.identity} answered with status {status}: {message}. {remedy}.")

    def _without_key(self, text: str) -> str:
        text = " ".join(text.split())[:300]
        return text.replace(self._key.get_secret_value(), "***") if self._key else text
