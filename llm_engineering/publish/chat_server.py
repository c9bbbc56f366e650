"""OpenAI's chat completions API for one model, in front of `transformers serve`.

`transformers serve` ignores many parameters, reads some in another way than OpenAI, and answers prompts that are longer
than the model's context. This server translates each request, or refuses it with OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import AutoConfig, PreTrainedTokenizerBase

from llm_engineering.data.rows import Message
from llm_engineering.feedback.served import ServedLog
from llm_engineering.formatting.render import UnrenderableError, checked_text, contains_text, prompt_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.chat_request import ApiError, ChatRequest, read_feedback, read_request
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

# The name of the model's folder at the engine.
ENGINE_MODEL = "model"
# Tokens of an answer if the request has no limit: the default of `transformers serve`.
DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class ServedModel:
    """A merged model, and where `transformers serve` runs it.

    Attributes:
        name: the model's name in requests.
        engine: the address of `transformers serve`.
        context: tokens of a prompt and its answer together; None if the model has no limit.
        generation: the contents of generation_config.json, the defaults of requests.
    """

    name: str
    engine: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    generation: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str, engine: str, settings: Settings, *, trust_remote_code: bool) -> ServedModel:
        """Read what the server needs from the model's folder."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
        tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder), trust_remote_code=trust_remote_code), settings)
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return cls(name, engine, tokenizer, getattr(config, "max_position_embeddings", None), generation)

    def check_name(self, name: str) -> None:
        """Check that a request names this model.

        Raises:
            ApiError: it names another one.
        """
        if name != self.name:
            message = f"The model '{name}' does not exist. This server has the model '{self.name}'."
            raise ApiError(404, message, "model_not_found", "model")

    def engine_request(self, request: ChatRequest) -> dict[str, Any]:
        """The request to `transformers serve` for the same answer.

        Raises:
            ApiError: the request names another model, the chat template cannot render its messages, they do not fit
                into the model's context, or `logit_bias` names no token of the model.
        """
        self.check_name(request.model)
        messages = [message.rendered for message in request.messages]
        generation = self.generation | _sampling(request)
        generation["max_new_tokens"] = self._limit(request, self._prompt_tokens(messages))
        optional = {"stop": request.stops, "seed": request.seed, "logit_bias": self._bias(request)}
        return {
            "model": ENGINE_MODEL,
            "messages": messages,
            # Always a stream: `transformers serve` ends an answer early only if its stream is closed.
            "stream": True,
            "generation_config": json.dumps(generation),
            **{key: value for key, value in optional.items() if value not in (None, [], {})},
        }

    def _prompt_tokens(self, messages: list[dict[str, str]]) -> int:
        conversation = [Message(**message) for message in messages]
        try:
            text = checked_text(self.tokenizer, conversation, True)
        except UnrenderableError as error:
            message = f"The model's chat template cannot render these messages: {error.__cause__ or error}."
            raise ApiError(400, message, "invalid_value", "messages") from None
        if conversation[0].role == "system" and not contains_text(text, conversation[0].content):
            message = "The model's chat template does not include system messages: leave them out."
            raise ApiError(400, message, "invalid_value", "messages[0]")
        return len(prompt_ids(conversation, self.tokenizer))

    def _limit(self, request: ChatRequest, prompt_tokens: int) -> int:
        asked = request.max_new_tokens
        if self.context is None:
            return asked or DEFAULT_NEW_TOKENS
        room = self.context - prompt_tokens
        if room < (asked or 1):
            answer = f" and {asked} for the answer" if asked else ""
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context} tokens, and you requested {prompt_tokens} tokens "
                f"in the messages{answer}. Shorten the messages or the answer.",
                "context_length_exceeded",
                "messages",
            )
        return asked or min(room, DEFAULT_NEW_TOKENS)

    def _bias(self, request: ChatRequest) -> dict[str, float]:
        for token in request.logit_bias:
            if not (token.isascii() and token.isdigit() and int(token) < len(self.tokenizer)):
                message = f"Invalid key in 'logit_bias': {token!r} is no token id of this model."
                raise ApiError(400, message, "invalid_value", "logit_bias")
        return request.logit_bias


def _sampling(request: ChatRequest) -> dict[str, Any]:
    """The keys of generation_config.json that choose tokens as the request asks. Without a wish, the file decides."""
    # OpenAI's default temperature is 1. It counts if the request limits the tokens to draw from.
    narrowed = request.top_p is not None and request.top_p < 1
    temperature = 1.0 if request.temperature is None and narrowed else request.temperature
    if temperature is None:
        return {}
    if temperature == 0 or request.top_p == 0:
        return {"do_sample": False}
    # 0 and 1 switch off what the file may have, and OpenAI's API does not.
    off = {"top_k": 0, "min_p": None, "typical_p": 1.0}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
    } | off


class _Chunk(NamedTuple):
    """A piece of an answer. The last one has a reason why the answer ended, and the number of tokens."""

    delta: dict[str, Any]
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


class StopTexts:
    """Cuts a stream of text before the first of some texts. Text that may begin one of them is held back."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.longest = max(map(len, texts), default=1)
        self.held = ""
        self.reached = False

    def feed(self, text: str) -> str:
        """Add text, and return what can be sent."""
        if self.reached:
            return ""
        self.held += text
        found = [(self.held.find(stop) + len(stop), self.held.find(stop)) for stop in self.texts if stop in self.held]
        if found:
            # The stop text that was complete first, and of two that end together the longer one.
            self.reached = True
            sent, self.held = self.held[: min(found)[1]], ""
            return sent
        start = max(len(self.held) - self.longest + 1, 0)
        sent, self.held = self.held[:start], self.held[start:]
        return sent


def _from_this_machine(request: Request) -> None:
    """Refuse a request of a web site that a browser on this machine shows, or whose name resolves to this machine."""
    origin = request.headers.get("origin")
    hosts = {request.url.hostname, *([] if origin is None else [urlsplit(origin).hostname])}
    if not hosts <= {"127.0.0.1", "localhost"}:
        raise ApiError(403, "This server answers only requests to 127.0.0.1 or localhost, and none of other web sites.")


def build_app(model: ServedModel, log: ServedLog | None = None, *, is_local: bool = False) -> FastAPI:
    """The server: `/v1/chat/completions`, `/v1/models`, `/v1/feedback` and `/health`.

    Args:
        is_local: refuse the requests of web sites.
        log: where requests, answers and feedback are written; None writes nothing and takes no feedback.
    """
    # The environment may name a proxy, which cannot reach this machine's loopback.
    client = httpx.AsyncClient(base_url=model.engine, timeout=None, trust_env=False)  # noqa: S113 - answers take minutes
    # The engine computes one answer at a time, and a seed applies to whatever it computes next.
    turn = asyncio.Lock()
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    # Without a schema and its pages: this API's documentation is OpenAI's.
    app = FastAPI(lifespan=lifespan, openapi_url=None, dependencies=[Depends(_from_this_machine)] if is_local else [])

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def refuse_address(request: Request, error: HTTPException) -> JSONResponse:
        message = (
            f"{error.detail}: {request.method} {request.url.path}. This server has /v1/chat/completions, /v1/models "
            "and /v1/feedback."
        )
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

    # SageMaker's addresses of a model are /ping and /invocations.
    @app.get("/ping")
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    description = {"id": model.name, "object": "model", "created": created, "owned_by": "llm-engineering"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        model.check_name(name)
        return description

    @app.post("/invocations")
    @app.post("/v1/chat/completions")
    async def complete(http: Request) -> Response:
        request = read_request(await http.body())
        chunks = _answer(client, turn, model.engine_request(request), request.stops)
        answer_id = f"chatcmpl-{secrets.token_hex(12)}"
        start = {"id": answer_id, "created": int(time.time()), "model": model.name}
        if log is not None:
            messages = [message.rendered for message in request.messages]
            chunks = _logged(chunks, partial(_write, log.write_answer, answer_id, messages))
        if not request.stream:
            return JSONResponse(await _completion(chunks, start, http))
        # Errors of the engine before the first token still get their status.
        first = await anext(chunks)
        usage = request.stream_options is not None and request.stream_options.include_usage
        return StreamingResponse(_events(first, chunks, start, usage), media_type="text/event-stream")

    @app.post("/v1/feedback")
    async def take_feedback(http: Request) -> dict[str, Any]:
        given = read_feedback(await http.body())
        if log is None:
            message = (
                "This server does not log its requests, so it takes no feedback on them. Start it with "
                'make serve ARGS="--set serving.log_requests=true".'
            )
            raise ApiError(400, message)
        if not log.has_answer(given.id):
            message = f"No answer with the id {given.id!r:.100} was logged. Send the id of an answer of this server."
            raise ApiError(404, message, "answer_not_found", "id")
        _write(log.write_feedback, given.id, given.thumbs, given.correction, given.user)
        return {"id": given.id, "object": "feedback", "created": int(time.time())}

    return app


def _write(write: Callable[..., None], *what: Any) -> None:
    """Write to the log.

    Raises:
        ApiError: it cannot be written.
    """
    try:
        write(*what)
    except OSError as error:
        message = (
            f"The log of requests cannot be written ({error.strerror}). Make room on the disk, or serve without it."
        )
        raise ApiError(500, message) from error


async def _logged(chunks: AsyncGenerator[_Chunk], write: Callable[..., None]) -> AsyncGenerator[_Chunk]:
    """Pass an answer on, and write it before its last piece is sent, so that feedback always finds it.

    What was computed of an answer that does not come to its end is written too.
    """
    answer = {"content": ""}
    is_written = False
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                for key, text in chunk.delta.items():
                    # The engine makes a list of calls of what looks like one. It is logged in the form of the engine.
                    answer[key] = answer.get(key, "") + (text if isinstance(text, str) else json.dumps(text))
                if chunk.finish_reason is not None:
                    is_written = True
                    write(answer, chunk.finish_reason, chunk.usage)
                yield chunk
    finally:
        if not is_written:
            write(answer, None, None)


async def _answer(
    client: httpx.AsyncClient, turn: asyncio.Lock, body: dict[str, Any], stops: list[str]
) -> AsyncGenerator[_Chunk]:
    """Yield the answer of the engine in pieces. Closing the iterator ends the engine's work.

    Raises:
        ApiError: the engine failed, or ended before its answer was complete.
    """
    stop = StopTexts(stops)
    try:
        async with turn, client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                raise _engine_failed((await response.aread()).decode(errors="replace"))
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                choice, usage = _parsed(line.removeprefix("data: "))
                delta = {key: value for key, value in choice["delta"].items() if key != "role"}
                if choice.get("finish_reason") is not None:
                    if stop.held:
                        yield _Chunk({"content": stop.held})
                    yield _Chunk({}, "stop" if stop.reached else choice["finish_reason"], usage)
                    return
                if "content" in delta:
                    delta["content"] = stop.feed(delta["content"])
                if any(delta.values()):
                    yield _Chunk(delta)
    except httpx.HTTPError as error:
        raise _engine_failed(str(error) or type(error).__name__) from error
    raise _engine_failed("it ended before the answer was complete")


def _parsed(line: str) -> tuple[dict[str, Any], dict[str, int] | None]:
    """The choice and the usage of a chunk of `transformers serve`, which writes the text of an error unescaped."""
    try:
        chunk = json.loads(line)
        return chunk["choices"][0], chunk.get("usage")
    except (ValueError, KeyError):
        raise _engine_failed(line) from None


def _engine_failed(why: str) -> ApiError:
    return ApiError(500, f"The model failed: {why[:500]}. The log of `serve` has the details.")


async def _completion(chunks: AsyncGenerator[_Chunk], start: dict[str, Any], http: Request) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    last = _Chunk({})
    async for last in chunks:
        # Nobody reads the answer any more. Without this, the engine would write it to its end.
        if await http.is_disconnected():
            await chunks.aclose()
            break
        for key, value in last.delta.items():
            message[key] = message[key] + value if key in message else value
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
    return {**start, "object": "chat.completion", "choices": [choice], "usage": last.usage}


async def _events(
    first: _Chunk, rest: AsyncIterator[_Chunk], start: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer."""

    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        chunk = {**start, "object": "chat.completion.chunk", "choices": choices}
        return f"data: {json.dumps(chunk | ({'usage': usage} if include_usage else {}))}\n\n"

    def choice(delta: dict[str, Any], finish_reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]

    yield event(choice({"role": "assistant", "content": "", "refusal": None}))
    chunk = first
    try:
        while True:
            yield event(choice(chunk.delta, chunk.finish_reason))
            if chunk.finish_reason is not None:
                break
            chunk = await anext(rest)
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    if include_usage:
        yield event([], chunk.usage)
    yield "data: [DONE]\n\n"
