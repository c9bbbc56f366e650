"""Client for Amazon Bedrock: calls the Converse API with boto3 in threads, with the credentials that AWS's tools find."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
)
from botocore.exceptions import ConnectionError as AWSConnectionError
from botocore.parsers import ResponseParserError

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

FINISH = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "content_filtered": "refused",
    "guardrail_intervened": "refused",
}
# Bedrock's status for a request on which the model failed. It is not in RETRIED_STATUS, but it is retried too.
MODEL_ERROR = 424


class Bedrock:
    """Builds and sends Converse requests.

    Raises:
        RequestError: AWS's tools find no credentials or no region.
    """

    def __init__(self, config: ClientConfig) -> None:
        self.model = str(config.model)
        self.timeout_s = config.timeout_s
        self.concurrency = config.concurrency
        session = boto3.Session()
        try:
            if session.region_name is None:
                raise RequestError("generation.client bedrock needs a region: set AWS_DEFAULT_REGION or AWS_PROFILE.")
            if session.get_credentials() is None:
                raise RequestError(
                    "generation.client bedrock finds no AWS credentials: run `aws sso login`, or set AWS_PROFILE or "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
                )
        except BotoCoreError as error:
            raise RequestError(
                f"The AWS settings of this machine cannot be used: {error}. Correct ~/.aws/config or the AWS_* variables."
            ) from error
        self.identity = f"{self.model} at Bedrock {session.region_name}"
        self._session = session

    def payload(self, messages: Messages, sampling: Sampling, schema: dict[str, Any] | None) -> dict[str, Any]:
        """The arguments of `converse`."""
        turns = [{"role": m["role"], "content": [{"text": m["content"]}]} for m in messages if m["role"] != "system"]
        system = [{"text": m["content"]} for m in messages if m["role"] == "system"]
        inference: dict[str, Any] = {"maxTokens": sampling.max_new_tokens}
        if sampling.temperature is not None:
            inference["temperature"] = sampling.temperature
        payload: dict[str, Any] = {"modelId": self.model, "messages": turns, "inferenceConfig": inference}
        if system:
            payload["system"] = system
        if schema is not None:
            structure = {"jsonSchema": {"name": "written", "schema": json.dumps(schema)}}
            payload["outputConfig"] = {"textFormat": {"type": "json_schema", "structure": structure}}
        return payload

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Send]:
        """Open a client with a thread for each request in flight. boto3 does not retry; retries.py does."""
        client = self._session.client(
            "bedrock-runtime",
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=self.timeout_s,
                read_timeout=self.timeout_s,
                max_pool_connections=self.concurrency,
            ),
        )
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="bedrock")
        try:

            async def send(payload: dict[str, Any]) -> Reply:
                return await loop.run_in_executor(pool, self._converse, client, payload)

            yield send
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def _converse(self, client: Any, payload: dict[str, Any]) -> Reply:
        try:
            response = client.converse(**payload)
        except ClientError as error:
            raise self._explained(error) from error
        except (NoCredentialsError, ParamValidationError) as error:
            raise EndpointRefusedError(f"{self.identity}: {error}. Nothing was sent.") from error
        except (HTTPClientError, AWSConnectionError, ResponseParserError) as error:
            raise TryAgainError(f"no answer from {self.identity} ({error})") from error
        except BotoCoreError as error:
            raise EndpointRefusedError(f"{self.identity}: {error}.") from error
        message = response.get("output", {}).get("message", {})
        usage = response.get("usage", {})
        return Reply(
            "".join(part.get("text", "") for part in message.get("content", [])),
            FINISH.get(response.get("stopReason", ""), "stop"),
            usage.get("inputTokens", 0),
            usage.get("outputTokens", 0),
        )

    def _explained(self, error: ClientError) -> Exception:
        code = error.response.get("Error", {}).get("Code", "")
        message = error.response.get("Error", {}).get("Message", "")
        metadata = error.response.get("ResponseMetadata", {})
        status = metadata.get("HTTPStatusCode", 0)
        if is_retried(status) or status == MODEL_ERROR:
            wait = retry_after_s(metadata.get("HTTPHeaders", {}).get("retry-after"), datetime.now(UTC))
            return TryAgainError(f"{code}: {message}", wait)
        if "Input is too long" in message:
            return RowRefusedError("too_long", f"the request does not fit into the model's context: {message}")
        remedy = {
            "AccessDeniedException": "Bedrock's console grants access to models; the credentials need bedrock:InvokeModel",
            "ResourceNotFoundException": "Check generation.model and the region",
            "ValidationException": "Check generation.model; some models need generation.response_format: prompt",
        }.get(code, "`aws sts get-caller-identity` shows whether the credentials are valid")
        return EndpointRefusedError(f"{self.identity} answered {code}: {message}. {remedy}.")
