"""Requests for chat completions: what is read, and what is refused with OpenAI's error object."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from llm_engineering.publish.chat_request import IDENTIFYING, NEUTRAL, ApiError, ChatRequest, read_request
from llm_engineering.publish.chat_server import StopTexts

QUESTION = {"role": "user", "content": "What is 3?"}
REQUEST = {"model": "m", "messages": [QUESTION]}


def refused(**changes):
    with pytest.raises(ApiError) as refusal:
        read_request(json.dumps(REQUEST | changes).encode())
    return refusal.value


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "invalid_value", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": "5"}, "invalid_value", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "invalid_parameter_combination", None),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"temperature": float("nan")}, "invalid_value", "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"n": 2}, "unsupported_value", "n"),
        ({"logprobs": True}, "unsupported_value", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "unsupported_value", "response_format"),
        ({"presence_penalty": 0.5}, "unsupported_value", "presence_penalty"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"top_k": 3}, "unsupported_parameter", "top_k"),
        ({"stream_options": {"include_usage": True}}, "invalid_parameter_combination", "stream_options"),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_its_name(changes, code, param):
    error = refused(**changes)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert error.body["error"] == {
        "message": str(error),
        "type": "invalid_request_error",
        "param": param,
        "code": code,
    }


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"model": "\\ud83d"}'])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError, match="The body of the request is not"):
        read_request(body)


def test_no_parameter_of_openai_is_ignored():
    known = {*ChatRequest.model_fields, *IDENTIFYING}
    for name in CompletionCreateParamsBase.__annotations__.keys() - known:
        assert refused(**{name: {"some": "value"}}).param == name


def test_values_that_ask_for_nothing_are_accepted():
    neutral = {name: values[0] for name, values in NEUTRAL.items()} | dict.fromkeys(IDENTIFYING, "me")
    nothing = dict.fromkeys(CompletionCreateParamsBase.__annotations__.keys() - REQUEST.keys() - neutral.keys())
    assert read_request(json.dumps(REQUEST | neutral | nothing).encode()) == ChatRequest(**REQUEST)


def test_messages_of_all_forms_become_those_of_chat_templates():
    answer = {"role": "assistant", "content": "Three.", "refusal": None, "tool_calls": None, "reasoning_content": "Hm."}
    parts = [{"type": "text", "text": "Is it"}, {"type": "text", "text": "odd?"}]
    messages = [{"role": "developer", "content": "Be short."}, QUESTION, answer, {"role": "user", "content": parts}]
    request = read_request(json.dumps(REQUEST | {"messages": messages}).encode())
    assert [message.rendered for message in request.messages] == [
        {"role": "system", "content": "Be short."},
        QUESTION,
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Is it\nodd?"},
    ]


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_its_first_stop_text_however_it_arrives(pieces, stops):
    cut = StopTexts(stops)
    sent = "".join(map(cut.feed, pieces)) + cut.held
    text = "".join(pieces)
    assert cut.reached == any(stop in text for stop in stops)
    # The first stop text is the one that is complete first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    start = min((text.find(stop) for stop in stops if stop in text[: min(ends)]), default=0) if ends else len(text)
    assert sent == text[:start]
