"""The server's answers to OpenAI's own client, in front of a real `transformers serve` and of one that fails."""

import asyncio
import http.server
import json
import socket
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers.cli.serve import Serve

from llm_engineering.feedback.served import ServedLog, read_answers, read_feedback
from llm_engineering.publish import chat_server
from llm_engineering.publish.chat_request import ApiError
from llm_engineering.publish.chat_server import ENGINE_MODEL, ServedModel
from llm_engineering.recipe.settings import Settings
from tests.tiny_models import write_model
from tools.servers.serve import bind, free_port, serving_chat

CONTEXT = 64
ASKED = {"model": "tiny-model", "messages": [{"role": "user", "content": "What is 3?"}]}
PROMPT_TOKENS = 22


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with a short context, served by `transformers serve` in this process."""
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / ENGINE_MODEL, "qwen3")
    for name, changes in (
        ("config.json", {"max_position_embeddings": CONTEXT}),
        ("generation_config.json", {"do_sample": False, "temperature": 0.6, "top_k": 1, "eos_token_id": [2]}),
    ):
        file = folder / ENGINE_MODEL / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        port = free_port()
        engine = Serve(force_model=ENGINE_MODEL, device="cpu", host="127.0.0.1", port=port, non_blocking=True)
        try:
            yield ServedModel.read(
                folder / ENGINE_MODEL,
                "tiny-model",
                f"http://127.0.0.1:{port}",
                Settings(),
                trust_remote_code=False,
            )
        finally:
            engine.kill_server()


def serve(model, log=None):
    """A context that serves the model, and its address."""
    listener = socket.socket()
    bind(listener, 0, "serve")
    return serving_chat(model, listener, log), f"http://127.0.0.1:{listener.getsockname()[1]}"


def connect(url):
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


@pytest.fixture(scope="module")
def client(model):
    serving, url = serve(model)
    with serving, connect(url) as client:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", httpx.URL(model.engine).port)) == 0:
                    break
            time.sleep(0.05)
        yield client


def ask(client, **options):
    completion = client.chat.completions.create(**ASKED | options)
    # OpenAI's client does not check answers against its types.
    ChatCompletion.model_validate(completion.model_dump(exclude_unset=True), strict=True)
    (choice,) = completion.choices
    assert completion.model == "tiny-model"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    return choice.message.content, choice.finish_reason, completion.usage.completion_tokens


@pytest.mark.parametrize("name", ["max_completion_tokens", "max_tokens"])
def test_both_limits_bound_an_answer(client, name):
    _, reason, tokens = ask(client, **{name: 5})
    assert (reason, tokens) == ("length", 5)


def test_an_answer_without_a_limit_ends_with_the_context(client):
    assert ask(client)[1:] == ("length", CONTEXT - PROMPT_TOKENS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": [{"role": "user", "content": "What is " * 99}]}, "you requested 314 tokens in the messages"),
        ({"max_tokens": CONTEXT - PROMPT_TOKENS + 1}, "22 tokens in the messages and 43 for the answer"),
    ],
)
def test_what_does_not_fit_into_the_context_is_refused(client, changes, words):
    with pytest.raises(openai.BadRequestError, match=words) as refusal:
        ask(client, **changes)
    assert refusal.value.code == "context_length_exceeded"


def letters(tokenizer):
    """A bias for answers of the letters a and b."""
    return {str(tokenizer.convert_tokens_to_ids(letter)): 50 for letter in "ab"}


def test_sampling_follows_the_request_and_not_the_greedy_file_of_the_model(client, model):
    options = {"logit_bias": letters(model.tokenizer), "max_tokens": 12}
    drawn, again, other = (ask(client, temperature=1, seed=seed, **options)[0] for seed in (1, 1, 2))
    assert set(drawn) == {"a", "b"}
    assert drawn == again != other
    greedy = ask(client, **options)[0]
    assert greedy == ask(client, temperature=0, seed=1, **options)[0]
    assert greedy not in (drawn, other)
    assert ask(client, top_p=0.9999, seed=1, **options)[0] == drawn


def test_a_stop_text_ends_the_answer_and_is_left_out(client, model):
    options = {"logit_bias": letters(model.tokenizer), "temperature": 1, "seed": 1, "max_tokens": 20}
    whole = ask(client, **options)[0]
    stop = whole[6:9]
    text, reason, tokens = ask(client, **options, stop=[stop, "never"])
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    assert tokens == len(text) + len(stop)
    streamed = client.chat.completions.create(**ASKED, **options, stop=stop, stream=True)
    chunks = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_has_the_same_answer_its_reason_and_its_usage(client, model):
    options = {"logit_bias": letters(model.tokenizer), "temperature": 1, "seed": 3, "max_tokens": 9}
    chunks = list(
        client.chat.completions.create(**ASKED, **options, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True), strict=True)
    *answer, last = chunks
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == ask(client, **options)[0]
    assert [chunk.choices[0].finish_reason for chunk in answer] == [None] * (len(answer) - 1) + ["length"]
    assert [chunk.usage for chunk in answer] == [None] * len(answer)
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 9, PROMPT_TOKENS)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done_and_has_usage_only_on_request(client):
    body = httpx.post(
        f"{client.base_url}chat/completions", json=ASKED | {"stream": True, "max_tokens": 2}, trust_env=False
    ).text
    assert body.endswith("data: [DONE]\n\n")
    assert "usage" not in body


def test_the_model_has_the_name_of_the_recipe(client):
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny-model").id] == ["tiny-model"]
    for call in (lambda: client.models.retrieve("other"), lambda: ask(client, model="tiny-model@main")):
        with pytest.raises(openai.NotFoundError, match="This server has the model 'tiny-model'") as refusal:
            call()
        assert refusal.value.code == "model_not_found"


def test_an_unknown_address_gets_an_error_object(client):
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings. This server has /v1/chat/completions"):
        client.embeddings.create(model="tiny-model", input="a")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only one turn') }}", "cannot render these messages: only one turn"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not include system messages"),
    ],
)
def test_messages_that_the_chat_template_cannot_show_are_refused(model, template, words):
    tokenizer = type(model.tokenizer).from_pretrained(model.tokenizer.name_or_path)
    tokenizer.chat_template = template
    serving, url = serve(replace(model, tokenizer=tokenizer))
    with serving, connect(url) as client, pytest.raises(openai.BadRequestError, match=words):
        ask(client, messages=[{"role": "system", "content": "Be short."}, *ASKED["messages"]])


def test_a_default_system_message_of_the_template_may_be_sent(model):
    tokenizer = type(model.tokenizer).from_pretrained(model.tokenizer.name_or_path)
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}system: Be short.{% endif %}" + turns
    server = replace(model, tokenizer=tokenizer)
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert server._prompt_tokens(asked) == server._prompt_tokens(asked[1:])
    # As long as the default, and not shown.
    tokenizer.chat_template = "system: Be short.{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ApiError, match="does not include system messages"):
        server._prompt_tokens([{"role": "system", "content": "Be shirt."}, asked[1]])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "rebound.example:8000"}, 403),
        ({"Origin": "https://site.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_web_sites_are_refused(client, headers, status):
    answer = httpx.get(f"{client.base_url}models", headers=headers, trust_env=False)
    assert answer.status_code == status
    if status == 403:
        assert "none of other web sites" in answer.json()["error"]["message"]


def test_what_the_engine_takes_for_a_call_is_logged():
    written = []

    async def chunks():
        yield chat_server._Chunk({"tool_calls": [{"name": "f"}]})
        yield chat_server._Chunk({}, "stop")

    async def read():
        return [chunk async for chunk in chat_server._logged(chunks(), lambda *what: written.append(what))]

    assert len(asyncio.run(read())) == 2
    assert written == [({"content": "", "tool_calls": '[{"name": "f"}]'}, "stop", None)]


@pytest.fixture
def logged(client, model, tmp_path):
    """A client of a server that logs, and the log. The engine of `client` answers."""
    log = ServedLog(tmp_path, 3, "abc")
    serving, url = serve(model, log)
    with serving, connect(url) as client:
        yield client, log


def give_feedback(client, **body):
    return client.post("/feedback", cast_to=object, body=body)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_logged_as_it_was_sent_before_the_client_has_its_end(logged, model, stream):
    client, log = logged
    asked = ASKED | {"logit_bias": letters(model.tokenizer), "temperature": 1, "seed": 1, "max_tokens": 9}
    if stream:
        chunks = []
        for chunk in client.chat.completions.create(**asked, stream=True):
            chunks.append(chunk)
            if chunk.choices[0].finish_reason:
                (record,) = read_answers(log.folder)
        name, text = chunks[0].id, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        completion = client.chat.completions.create(**asked)
        (record,) = read_answers(log.folder)
        name, text = completion.id, completion.choices[0].message.content
    assert text
    assert (record["id"], record["answer"]["content"], record["finish_reason"]) == (name, text, "length")
    assert record["messages"] == ASKED["messages"]
    assert (record["usage"]["prompt_tokens"], record["usage"]["completion_tokens"]) == (PROMPT_TOKENS, 9)


def test_feedback_by_the_answers_id_is_written(logged):
    client, log = logged
    name = client.chat.completions.create(**ASKED, max_tokens=2).id
    body = {"id": name, "thumbs": "down", "correction": "A number.", "user": "anna"}
    assert give_feedback(client, **body)["id"] == name
    ((said, served),) = read_feedback(log.folder)
    assert {key: said[key] for key in body} == body
    assert served["id"] == name


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"id": "chatcmpl-0"}, "id", "No answer with the id 'chatcmpl-0' was logged"),
        ({"thumbs": "sideways"}, "thumbs", "'thumbs'"),
        ({"thumbs": None}, "thumbs", "'thumbs'"),
        ({"correction": " "}, "correction", "'correction'"),
        ({"stars": 3}, "stars", "not supported"),
        ({"user": "anna@firma.de"}, "user", "'user'"),
        ({"user": "212-555-0123"}, "user", "Send a pseudonym"),
    ],
)
def test_wrong_feedback_gets_an_error_object_and_is_not_written(logged, changes, param, words):
    client, log = logged
    name = client.chat.completions.create(**ASKED, max_tokens=2).id
    error = openai.NotFoundError if param == "id" else openai.BadRequestError
    with pytest.raises(error, match=words) as refusal:
        give_feedback(client, **{"id": name, "thumbs": "up"} | changes)
    assert refusal.value.param == param
    assert read_feedback(log.folder) == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_log_that_cannot_be_written_is_an_error_object(logged, stream):
    client, log = logged
    log.folder.rmdir()
    log.folder.touch()
    with pytest.raises(openai.APIError, match="The log of requests cannot be written"):
        list(client.chat.completions.create(**ASKED, max_tokens=2, stream=stream))


def test_a_server_without_a_log_says_how_to_switch_it_on(client):
    with pytest.raises(openai.BadRequestError, match="serving.log_requests=true"):
        give_feedback(client, id="chatcmpl-0", thumbs="up")


class Engine(http.server.BaseHTTPRequestHandler):
    """Streams pieces of a long answer until its connection is closed, or fails after the first one."""

    closed = threading.Event()

    def do_POST(self):
        seed = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("seed")
        self.send_response(500 if seed == 500 else 200)
        self.end_headers()
        piece = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}
        try:
            for _ in range(1 if seed else 2000):
                self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
                time.sleep(0.005)
        except OSError:
            self.closed.set()
        if seed == 3:
            self.wfile.write(b'data: {"error": "out of "memory""}\n\n')

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def failing(model, tmp_path_factory):
    engine = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    log = ServedLog(tmp_path_factory.mktemp("failing"), 3, "abc")
    serving, url = serve(replace(model, engine=f"http://127.0.0.1:{engine.server_port}"), log)
    with serving, connect(url) as client:
        yield client, log
    engine.shutdown()
    engine.server_close()


@pytest.mark.parametrize(
    ("seed", "words"), [(3, "The model failed: .*memory"), (4, "it ended before the answer was complete")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_an_error_also_within_a_stream(failing, stream, seed, words):
    client, _ = failing
    with pytest.raises(openai.APIError, match=words):
        list(client.chat.completions.create(**ASKED, stream=stream, seed=seed))


def test_an_engine_that_refuses_is_a_server_error(failing):
    with pytest.raises(openai.InternalServerError, match="The model failed: data: ") as refusal:
        failing[0].chat.completions.create(**ASKED, seed=500, stream=True)
    assert refusal.value.type == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_engines_work(failing, stream):
    client, log = failing
    before = len(read_answers(log.folder))
    Engine.closed.clear()
    body = json.dumps(ASKED | {"stream": stream}).encode()
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(0.05)
    assert Engine.closed.wait(8)
    # What was computed until then is logged.
    for _ in range(400):
        if len(answers := read_answers(log.folder)) > before:
            break
        time.sleep(0.02)
    assert answers[-1]["answer"]["content"].startswith("a")
    assert answers[-1]["finish_reason"] is None
