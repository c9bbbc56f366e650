"""A request for a chat completion, checked against OpenAI's schema: what this server cannot do is refused.

Feedback on an answer is checked in the same way.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_engineering.data.private import redacted

# Values of parameters that ask for nothing. Clients often send them. Other values are refused, because
# `transformers serve` would ignore them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
}
# Parameters that say who asks. They do not change an answer.
IDENTIFYING = ("prompt_cache_key", "safety_identifier", "user")

Stop = Annotated[str, Field(min_length=1)]


class ApiError(Exception):
    """An error in OpenAI's form.

    Attributes:
        code: OpenAI's name of the error, e.g. `model_not_found`; None if it has none.
        param: the parameter of the request that is wrong, or None.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Part):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    """A message of a conversation.

    Attributes:
        reasoning_content: what an earlier answer of this server began with. It is left out of the prompt, as chat
            templates leave out the reasoning of earlier answers.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    reasoning_content: str | None = None

    @property
    def rendered(self) -> dict[str, str]:
        """The message as chat templates read it. `developer` is OpenAI's newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Part):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Part):
    """The parameters that change an answer.

    https://platform.openai.com/docs/api-reference/chat/create
    """

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def max_new_tokens(self) -> int | None:
        """The requested limit of the answer in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class FeedbackRequest(_Part):
    """What a person says about an answer.

    Attributes:
        correction: a better answer.
        user: a pseudonym of the person.
    """

    id: str
    thumbs: Literal["up", "down"]
    correction: Annotated[str, Field(pattern=r"\S", max_length=100_000)] | None = None
    user: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")] | None = None


def read_request(body: bytes) -> ChatRequest:
    """Read and check the body of a request.

    Raises:
        ApiError: the body is not a request for a chat completion, or it asks for something that this server cannot do.
    """
    given = _without_nulls(_json_object(body))
    for key in [key for key in given if key in NEUTRAL or key in IDENTIFYING]:
        value = given.pop(key)
        if key in NEUTRAL and value not in NEUTRAL[key]:
            supported = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[key])
            message = f"Unsupported value: '{key}' does not support {json.dumps(value)[:100]} with this server"
            raise ApiError(400, f"{message}. Leave it out, or set it to {supported}.", "unsupported_value", key)
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            400,
            "'max_tokens' and 'max_completion_tokens' cannot both be set. Use 'max_completion_tokens'.",
            "invalid_parameter_combination",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "'stream_options' needs 'stream': true.", "invalid_parameter_combination", "stream_options")
    return request


def read_feedback(body: bytes) -> FeedbackRequest:
    """Read and check the body of feedback on an answer.

    Raises:
        ApiError: the body is no feedback, or its `user` is personal data.
    """
    try:
        given = FeedbackRequest.model_validate(_json_object(body))
    except ValidationError as error:
        raise _explained(error) from None
    if given.user is not None and redacted(given.user) != given.user:
        message = "'user' is personal data, and datasets name it as the origin of rows. Send a pseudonym."
        raise ApiError(400, message, "invalid_value", "user")
    return given


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
        # Half of a surrogate pair is valid JSON, and no text that a tokenizer can read.
        json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        message = f"The body of the request is not valid JSON in UTF-8: {error}."
        raise ApiError(400, message) from None
    if not isinstance(given, dict):
        raise ApiError(400, "The body of the request is not a JSON object.")
    return given


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """Drop keys with null, which OpenAI's schema treats as absent. Clients send back messages with such keys."""
    request = {key: value for key, value in given.items() if value is not None}
    if isinstance(messages := request.get("messages"), list):
        request["messages"] = [
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
            for message in messages
        ]
    return request


def _explained(error: ValidationError) -> ApiError:
    # If a value may have several types, pydantic has an error for each of them, with the type's name in the path. The
    # error with the longest path belongs to the type that fits best.
    problem = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
    path = [part for part in problem["loc"] if isinstance(part, int) or part in _NAMES]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if problem["type"] == "extra_forbidden":
        param = ".".join(map(str, problem["loc"]))
        return ApiError(
            400, f"Unsupported parameter: '{param}' is not supported by this server.", "unsupported_parameter", param
        )
    if problem["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", "missing_required_parameter", param)
    return ApiError(400, f"Invalid value for '{param}': {problem['msg']}.", "invalid_value", param)


_MODELS: tuple[type[_Part], ...] = (ChatRequest, ChatMessage, TextPart, StreamOptions, FeedbackRequest)
_NAMES = {name for model in _MODELS for name in model.model_fields}
