"""Endpoints: retries, caps, repair, secrets and refused settings. No reply raises an exception."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from tenacity import Future, RetryCallState

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.generation.clients import retries
from llm_engineering.generation.clients.endpoint import read_reply
from llm_engineering.generation.clients.open import check_access, open_client
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Answer, Reply, Sampling
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, GenerationConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.fakes.scripted_endpoint import Response, ScriptedEndpoint, completion, converse, error

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
JSON = Sampling(100, None, json_field="instruction")
GOOD = '{"instruction": "Why?"}'


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr(retries, "_backoff", lambda state: 0.001)


def client(endpoint, settings, **keys):
    config = {"client": "openai", "model": "m", "timeout_s": 5, "base_url": endpoint and f"{endpoint.url}/v1"} | keys
    return open_client(ClientConfig.model_validate(config), ModelConfig(), ComputeConfig(), settings)


def ask(endpoint, settings, count=1, sampling=JSON, **keys):
    requests = [[{"role": "user", "content": f"Number {i}"}] for i in range(count)]
    return client(endpoint, settings, **keys).answer(requests, sampling, "answers")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("7", 7.0),
        ("0.25", 0.25),
        ("-3", 0.0),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 12:00:30 -0000", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after(value, seconds):
    assert retries.retry_after_s(value, NOW) == seconds


@given(st.text())
def test_any_retry_after_header_is_accepted(value):
    wait = retries.retry_after_s(value, NOW)
    assert wait is None or wait >= 0


def waits(attempt, failure, times=300):
    state = RetryCallState(retries.retrying(9, None), None, (), {})
    state.attempt_number = attempt
    state.outcome = Future(attempt)
    state.outcome.set_exception(failure)
    return [retries.wait_s(state) for _ in range(times)]


@pytest.mark.parametrize(("attempt", "most"), [(1, 0.5), (2, 1.0), (4, 4.0), (8, 60.0), (50, 60.0)])
def test_backoff_is_exponential_with_full_jitter(attempt, most, monkeypatch):
    monkeypatch.undo()
    drawn = waits(attempt, retries.TryAgainError("x"))
    assert 0 <= min(drawn) < most / 4
    assert most * 3 / 4 < max(drawn) <= most


def test_waits_are_at_least_retry_after_up_to_a_maximum():
    drawn = waits(1, retries.TryAgainError("x", 10.0))
    assert 10.0 <= min(drawn) < max(drawn) <= 11.0
    assert set(waits(1, retries.TryAgainError("x", 0.0))) == {0.0}
    with pytest.raises(retries.EndpointRefusedError, match="asks to wait 7200 s"):
        waits(1, retries.TryAgainError("x", 7200.0))


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Reply(GOOD), "Why?"),
        (Reply(f"```json\n{GOOD}\n```"), "Why?"),
        (Reply(f" {GOOD}\n"), "Why?"),
        (Reply("Why?"), "bad_json"),
        (Reply(GOOD[:-1]), "bad_json"),
        (Reply("[" * 100_000), "bad_json"),
        (Reply('{"instruction": 5}'), "wrong_schema"),
        (Reply('{"question": "Why?"}'), "wrong_schema"),
        (Reply('{"instruction": "Why?", "more": 1}'), "wrong_schema"),
        (Reply('["Why?"]'), "wrong_schema"),
        (Reply('{"instruction": " "}'), "empty_answer"),
        (Reply(" \n"), "empty_answer"),
        (Reply(GOOD, "length"), "truncated_answer"),
        (Reply("I cannot", "refused"), "refused"),
    ],
)
def test_outcomes_of_replies(reply, outcome):
    judged = read_reply(reply, "instruction")
    assert (judged.text if isinstance(judged, Answer) else judged.reason) == outcome


@given(st.text() | st.text(alphabet='{}[]":,instructo\\ud8\n` '), st.sampled_from(["instruction", None]))
def test_every_text_has_an_outcome(text, field):
    judged = read_reply(Reply(text), field)
    assert isinstance(judged, Answer) or judged.reason in ("bad_json", "wrong_schema", "empty_answer")


def test_every_response_body_has_an_outcome(settings):
    bodies = [b"", b"\xff", b"null", b"[]", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": 1}]}',
              b'{"choices": [{"message": {"content": "\\ud800"}}]}', b"<html>"]  # fmt: skip

    def script(asked):
        number = int(asked.turns[0].removeprefix("Number "))
        return Response(body=bodies[number]) if number < len(bodies) else completion(GOOD)

    with ScriptedEndpoint(script) as endpoint:
        outcomes = ask(endpoint, settings, len(bodies) + 1, max_retries=0, concurrency=1)
    assert [getattr(outcome, "reason", "kept") for outcome in outcomes] == ["request_failed"] * len(bodies) + ["kept"]


def test_one_repair_request_quotes_the_error(settings):
    def script(asked):
        if len(asked.turns) == 1:
            return completion(
                "Why not?" if "1" in asked.turns[0] else '{"wrong": 1}' if "2" in asked.turns[0] else GOOD
            )
        return completion(GOOD if "1" in asked.turns[0] else "No.")

    with ScriptedEndpoint(script) as endpoint:
        outcomes = ask(endpoint, settings, 3)
        assert outcomes[:2] == [Answer("Why?")] * 2
        assert (outcomes[2].reason, outcomes[2].text) == ("bad_json", "No.")
        repairs = [asked.turns for asked in endpoint.requests if len(asked.turns) > 1]
        assert sorted(turns[1] for turns in repairs) == ["Why not?", '{"wrong": 1}']
        assert {turns[1]: turns[2].split(")")[0] for turns in repairs}['{"wrong": 1}'].endswith("Field required")
        # Bad replies are stored too, so nothing is paid for twice.
        assert ask(endpoint, settings, 3) == outcomes
        assert len(endpoint.requests) == 5


def test_refused_and_truncated_answers_fail_only_their_row(settings):
    replies = [
        completion("half an ans", "length"),
        completion(None, refusal="I will not."),
        completion("", "content_filter"),
        error(400, "filtered", "content_filter"),
        error(400, "too long", "context_length_exceeded"),
        error(400, "This model's maximum context length is 8 tokens. However, you requested 9 tokens", "400"),
        completion(GOOD),
    ]
    with ScriptedEndpoint(lambda asked: replies[int(asked.turns[0][-1])]) as endpoint:
        outcomes = ask(endpoint, settings, 7)
    reasons = [getattr(outcome, "reason", "kept") for outcome in outcomes]
    assert reasons == ["truncated_answer", "refused", "refused", "refused", "too_long", "too_long", "kept"]
    assert outcomes[0].text == "half an ans"


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_transient_errors_are_retried_up_to_max_retries(status, settings):
    with ScriptedEndpoint(lambda asked: error(status, "later") if asked.attempt < 2 else completion(GOOD)) as endpoint:
        assert ask(endpoint, settings, max_retries=2) == [Answer("Why?")]
        assert len(endpoint.requests) == 3

    def fails_for_one(asked):
        return error(status, "later") if "0" in asked.turns[0] else completion(GOOD)

    with ScriptedEndpoint(fails_for_one) as endpoint:
        failed, kept = ask(endpoint, settings, 2, max_retries=2)
        assert (failed.reason, kept) == ("request_failed", Answer("Why?"))
        assert failed.detail == f"status {status}: later, after 2 retries"
        # The next run sends a failed request again.
        endpoint.script = lambda asked: completion(GOOD)
        assert ask(endpoint, settings, 2) == [Answer("Why?")] * 2
        assert len(endpoint.requests) == 5


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(400, None, "does not accept"), (401, None, "OPENAI_API_KEY"), (403, None, "no access"),
     (404, None, "generation.model"), (429, "insufficient_quota", "no credit")],
)  # fmt: skip
def test_permanent_errors_end_the_run_at_once(status, code, words, settings):
    def script(asked):
        return completion(GOOD) if len(endpoint.requests) <= 3 else error(status, "so it is", code)

    with ScriptedEndpoint(script) as endpoint:
        with pytest.raises(WorkError, match=words) as raised:
            ask(endpoint, settings, 20, concurrency=1)
        assert len(endpoint.requests) == 4
        assert "Done so far: 3 of 20 answers, 210 tokens" in str(raised.value)
        endpoint.script = lambda asked: completion(GOOD)
        assert ask(endpoint, settings, 20, concurrency=1) == [Answer("Why?")] * 20
        assert len(endpoint.requests) == 4 + 17


def test_a_run_without_any_answer_is_an_error(settings):
    with ScriptedEndpoint(lambda asked: error(500, "broken")) as endpoint:
        with pytest.raises(WorkError, match="answered none of 3 requests: status 500: broken"):
            ask(endpoint, settings, 3, max_retries=0)
        with pytest.raises(WorkError, match="none of the last 20 requests"):
            ask(endpoint, settings, 100, max_retries=0, concurrency=1)
        assert len(endpoint.requests) == 23


@pytest.mark.parametrize(
    ("cap", "higher", "answered", "words"),
    [
        # With 70 tokens per answer, the fourth answer reaches the cap.
        ({"max_total_tokens": 280}, {"max_total_tokens": 10_000}, 4, "max_total_tokens 280 is reached"),
        # 50 input and 20 output tokens cost 0.0002 dollars, so the fifth answer reaches the cap.
        ({"max_cost_usd": 0.001}, {"max_cost_usd": 1.0}, 5, "350 tokens, $0.0010"),
    ],
)
def test_caps_stop_the_run_and_a_higher_cap_continues_it(cap, higher, answered, words, settings):
    prices = {"prices": {"input_per_million": 2.0, "output_per_million": 5.0}} if "max_cost_usd" in cap else {}
    with ScriptedEndpoint(lambda asked: completion(GOOD)) as endpoint:
        for _ in range(2):
            # Stored answers count too: the same command spends nothing more.
            with pytest.raises(WorkError, match="raise it to continue") as raised:
                ask(endpoint, settings, 10, concurrency=1, **cap, **prices)
            assert words in str(raised.value)
            assert len(endpoint.requests) == answered
        assert ask(endpoint, settings, 10, **higher, **prices) == [Answer("Why?")] * 10
        assert len(endpoint.requests) == 10
        # All answers are stored, so the former cap does not stop the run.
        assert len(ask(endpoint, settings, 10, **cap, **prices)) == 10


def test_results_are_in_the_order_of_the_requests(settings):
    def script(asked):
        number = int(asked.turns[0].removeprefix("Number "))
        response = completion(json.dumps({"instruction": str(number)}))
        response.delay_s = 0.1 - number / 100
        return response

    with ScriptedEndpoint(script) as endpoint:
        outcomes = ask(endpoint, settings, 10, concurrency=10)
        assert endpoint.most_at_once > 1
    assert outcomes == [Answer(str(number)) for number in range(10)]


def test_equal_requests_are_sent_once(settings):
    with ScriptedEndpoint(lambda asked: completion(GOOD)) as endpoint:
        same = [[{"role": "user", "content": "Same"}]] * 5
        assert client(endpoint, settings).answer(same, JSON, "answers") == [Answer("Why?")] * 5
        assert len(endpoint.requests) == 1


def test_settings_that_change_the_answer_change_the_request(settings):
    with ScriptedEndpoint(lambda asked: completion(GOOD)) as endpoint:
        ask(endpoint, settings)
        for keys in ({"model": "other"}, {"response_format": "prompt"}):
            ask(endpoint, settings, **keys)
        ask(endpoint, settings, sampling=Sampling(100, 0.5, json_field="instruction"))
        ask(endpoint, settings, sampling=Sampling(100, None, seed=1, json_field="instruction"))
        ask(endpoint, settings, sampling=Sampling(101, None, json_field="instruction"))
        assert len(endpoint.requests) == 6
        # These settings do not change the answers, so nothing is sent.
        ask(endpoint, settings, concurrency=3, timeout_s=9, max_retries=1, max_total_tokens=10**6)
        assert len(endpoint.requests) == 6
        assert "JSON schema" in endpoint.requests[2].turns[0]
        assert "response_format" not in endpoint.requests[2].body
        assert endpoint.requests[0].body["response_format"]["json_schema"]["strict"] is True


def check(endpoint, settings, **keys):
    config = {"client": "openai", "model": "m", "base_url": f"{endpoint.url}/v1", "timeout_s": 1} | keys
    check_access(ClientConfig.model_validate(config), settings, 100, "instruction")


def test_failed_access_is_explained(settings):
    with ScriptedEndpoint(lambda asked: completion("Why is the sea salty?")) as endpoint:
        with pytest.raises(RequestError, match="generation.response_format: prompt"):
            check(endpoint, settings)
        check(endpoint, settings, response_format="prompt")
        check(endpoint, settings, response_format="text")
        endpoint.script = lambda asked: completion(GOOD)
        check(endpoint, settings, max_total_tokens=5)
        endpoint.script = lambda asked: completion(GOOD, tokens=(0, 0))
        with pytest.raises(RequestError, match="reports no usage"):
            check(endpoint, settings, max_total_tokens=5)
        endpoint.script = lambda asked: error(404, "no such model")
        with pytest.raises(RequestError, match="Check generation.model"):
            check(endpoint, settings)
        endpoint.script = lambda asked: error(400, "This model's maximum context length is 8 tokens")
        with pytest.raises(RequestError, match="refuses a short request for 100 tokens"):
            check(endpoint, settings)
        endpoint.script = lambda asked: Response(delay_s=1.2, dropped=True)
        with pytest.raises(RequestError, match="no answer within 1 s"):
            check(endpoint, settings)
    with pytest.raises(RequestError, match="cannot be reached: no connection"):
        check(endpoint, settings)
    with pytest.raises(RequestError, match="set OPENAI_API_KEY"):
        check(endpoint, settings, base_url=None)
    assert not (settings.llm_output_dir / "answers.jsonl").exists()


def test_bedrock_needs_credentials_and_a_region(settings, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    config = ClientConfig(client="bedrock", model="m", timeout_s=5)
    with pytest.raises(RequestError, match="AWS_DEFAULT_REGION"):
        check_access(config, settings, 100, "instruction")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with pytest.raises(RequestError, match="aws sso login"):
        check_access(config, settings, 100, "instruction")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with ScriptedEndpoint(lambda asked: error(403, "no", "AccessDeniedException")) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", endpoint.url)
        with pytest.raises(RequestError, match="grants access to models"):
            check_access(config, settings, 100, "instruction")
        endpoint.script = lambda asked: error(400, "no such model", "ValidationException")
        with pytest.raises(RequestError, match="Check generation.model"):
            check_access(config, settings, 100, "instruction")


def test_bedrock_refuses_only_the_row_that_is_too_long(settings, monkeypatch):
    for name, value in {"REGION": "eu-central-1", "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"AWS_DEFAULT_{name}" if name == "REGION" else f"AWS_{name}", value)
    refused = error(400, "Input is too long for requested model.", "ValidationException")
    with ScriptedEndpoint(lambda asked: refused if "0" in asked.turns[0] else converse(GOOD)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", endpoint.url)
        failed, kept = ask(endpoint, settings, 2, client="bedrock", base_url=None)
    assert (failed.reason, kept) == ("too_long", Answer("Why?"))


def test_an_endpoint_on_this_machine_needs_no_key(settings):
    assert client(None, settings, base_url="http://vllm.localhost:8000/v1").transport.is_loopback


def test_keys_are_sent_but_never_stored_or_logged(settings, caplog):
    secret = "sk-planted-secret"
    settings = settings.model_copy(update={"openai_api_key": SecretStr(secret)})

    def echoes(asked):
        assert asked.headers["authorization"] == f"Bearer {secret}"
        return error(401, f"wrong key {secret}") if "0" in asked.turns[0] else completion(GOOD)

    with ScriptedEndpoint(echoes) as endpoint, caplog.at_level("DEBUG", logger="llm_engineering"):
        with pytest.raises(WorkError) as raised:
            ask(endpoint, settings, 4, concurrency=1)
        endpoint.script = lambda asked: error(401, f"wrong key {secret}")
        with pytest.raises(RequestError) as refused:
            check(endpoint, settings)
        endpoint.script = lambda asked: completion(GOOD)
        ask(endpoint, settings, 4)
    assert "wrong key ***" in str(raised.value)
    assert secret not in str(raised.value) + str(refused.value) + caplog.text + repr(settings)
    written = [file.read_text() for file in settings.llm_output_dir.rglob("*") if file.is_file()]
    assert written
    assert secret not in "".join(written)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": "m"}, "model has no effect with client local"),
        ({"base_url": "http://127.0.0.1/v1"}, "base_url has no effect with client local"),
        ({"concurrency": 2}, "concurrency has no effect"),
        ({"temperature": 0.5}, "temperature has no effect"),
        ({"response_format": "text"}, "response_format has no effect"),
        ({"max_total_tokens": 5}, "max_total_tokens has no effect"),
        ({"rejected_by": "client"}, "client local is the base model already"),
        ({"client": "openai"}, "client openai needs `model`"),
        ({"client": "bedrock"}, "client bedrock needs `model`"),
        ({"client": "bedrock", "model": "m", "base_url": "http://127.0.0.1"}, "base_url belongs to client openai"),
        ({"client": "openai", "model": "m", "base_url": "127.0.0.1:8000"}, "is no address"),
        ({"client": "openai", "model": "m", "base_url": "http://u:p@host/v1"}, "may hold no password"),
        ({"client": "openai", "model": "m", "max_cost_usd": 1.0}, "max_cost_usd needs `prices`"),
        ({"client": "openai", "model": "m", "concurrency": 0}, "greater than or equal to 1"),
        ({"client": "openai", "model": "m", "timeout_s": 0}, "greater than 0"),
        ({"styles": {}}, "no weight above 0"),
        ({"styles": {"question": 0}}, "no weight above 0"),
        ({"styles": {"essay": 1}}, "question"),
        ({"styles": {"question": -1}}, "greater than or equal to 0"),
        ({"answers": "model"}, "with `answers: model`, answer_max_new_tokens must be set"),
        ({"answer_max_new_tokens": 100}, "no effect with answers document"),
        ({"questions": "fact", "answers": "model"}, "answers has no effect with questions fact"),
        ({"questions": "fact", "styles": {"task": 1}}, "styles has no effect with questions fact"),
        ({"questions": "fact", "answer_max_new_tokens": 9}, "answer_max_new_tokens has no effect with questions fact"),
        ({"questions": "fact", "client": "openai", "model": "m"}, "questions fact needs client local"),
    ],
)
def test_contradictory_settings_are_refused(keys, words):
    with pytest.raises(ValidationError, match=words):
        GenerationConfig.model_validate(keys)


def test_the_store_skips_unreadable_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerStore(path) as store:
        store.add({"a": Reply("one"), "b": Reply("zwei\n\u2028", "length", 3, 4)})
    with path.open("ab") as file:
        file.write(b'[]\n\xff\n{"key": "x"}\n{"key": [], "answer": ""}\n{"key": "half-writ')
    with AnswerStore(path) as store:
        assert store.answers == {"a": Reply("one"), "b": Reply("zwei\n\u2028", "length", 3, 4)}
        store.add({"c": Reply("three")})
    assert AnswerStore(path).answers.keys() == {"a", "b", "c"}
    assert path.read_bytes().startswith(b'{"key": "a", "answer": "one"}\n')


def test_two_processes_can_write_one_store(tmp_path):
    path = tmp_path / "answers.jsonl"
    script = (
        "import sys; from pathlib import Path; from llm_engineering.generation.store import AnswerStore, Reply\n"
        "store = AnswerStore(Path(sys.argv[1]))\n"
        "for i in range(2000): store.add({f'{sys.argv[2]}{i}': Reply(sys.argv[2] * (i % 5000))})\n"
    )
    root = Path(__file__).resolve().parents[3]
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), name], cwd=root) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    stored = AnswerStore(path).answers
    assert stored == {f"{name}{i}": Reply(name * (i % 5000)) for name in "ab" for i in range(2000)}
