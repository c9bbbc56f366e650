"""Following a job: its log read on where it stopped, lost connections, and what Ctrl-C means."""

import io
import os
import signal

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from llm_engineering.cloud.sagemaker import jobs as following
from llm_engineering.cloud.sagemaker.jobs import JobLog, Signals, follow


def refused(code, status=400):
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "operation")


class Logs:
    """Streams as CloudWatch shows them: at most two events a page, and a token that stays the same at the end."""

    def __init__(self):
        self.streams = None

    def get_paginator(self, operation):
        assert operation == "describe_log_streams"
        return self

    def paginate(self, **asked):
        if self.streams is None:
            raise refused("ResourceNotFoundException")
        names = [name for name in self.streams if name.startswith(asked["logStreamNamePrefix"])]
        yield from ({"logStreams": [{"logStreamName": name}]} for name in names)

    def get_log_events(self, **asked):
        assert asked["startFromHead"]
        start = int(asked.get("nextToken", "0"))
        lines = self.streams[asked["logStreamName"]][start : start + 2]
        return {"events": [{"message": line} for line in lines], "nextForwardToken": str(start + len(lines))}


def test_log_goes_on_where_it_stopped():
    logs = Logs()
    log = JobLog(logs, "a-job")
    assert log.read() == []
    logs.streams = {"a-job/algo-1-17": ["1", "2", "3", "4", "5 \n"], "a-job-2/algo-1-17": ["of another job"]}
    assert log.read() == ["1", "2", "3", "4", "5"]
    assert log.read() == []
    logs.streams["a-job/algo-1-17"].append("6")
    assert log.read() == ["6"]
    # A restart after an interruption has a stream of its own.
    logs.streams["a-job/algo-1-99"] = ["7"]
    assert log.read() == ["7"]


def test_lines_of_several_machines_are_told_apart_and_the_last_are_kept():
    logs = Logs()
    logs.streams = {"j/algo-1-17": [str(number) for number in range(60)], "j/algo-2-17": ["x"]}
    log = JobLog(logs, "j")
    assert log.read()[-2:] == ["algo-1: 59", "algo-2: x"]
    assert len(log.last) == 50
    assert log.last[-1] == "algo-2: x"


class Job:
    """SageMaker's answers about one job, one after another; an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.stopped = 0

    def describe_training_job(self, **asked):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer()
        return {
            "TrainingJobName": asked["TrainingJobName"],
            "TrainingJobStatus": answer,
            "SecondaryStatusTransitions": [{"Status": answer, "StatusMessage": "As it is."}],
        }

    def stop_training_job(self, **asked):
        self.stopped += 1
        self.answers = ["Stopping", "Stopped"]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(following, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(following, "_LAST_LINES_S", 0.01)


def followed(job):
    with Signals() as signals:
        return follow(job, JobLog(Logs(), "a-job"), "a-job", signals)


def test_lost_connection_is_waited_for(caplog):
    lost = EndpointConnectionError(endpoint_url="https://sagemaker")
    job = Job("InProgress", lost, lost, refused("ServiceUnavailable", 503), refused("ThrottlingException"), "Completed")
    assert followed(job)["TrainingJobStatus"] == "Completed"
    assert caplog.text.count("AWS cannot be reached") == 1


def test_refusal_is_not_waited_for():
    with pytest.raises(ClientError):
        followed(Job("InProgress", refused("ExpiredToken")))


def interrupted(answer="InProgress", number=signal.SIGINT):
    def ask():
        os.kill(os.getpid(), number)
        return answer

    return ask


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    def answer(text):
        monkeypatch.setattr("sys.stdin", Terminal(text))
        monkeypatch.setattr("sys.stderr", Terminal())

    return answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_where_nobody_can_be_asked(number, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("d\n"))
    job = Job(interrupted(number=number))
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        followed(job)
    assert job.stopped == 1


@pytest.mark.parametrize("answer", ["\n", "s\n", "", "what?\n"])
def test_ctrl_c_asks_and_stops_by_default(answer, terminal):
    terminal(answer)
    job = Job(interrupted())
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        followed(job)
    assert job.stopped == 1


def test_ctrl_c_can_detach(terminal):
    terminal("d\n")
    job = Job(interrupted())
    with pytest.raises(KeyboardInterrupt, match="detached"):
        followed(job)
    assert job.stopped == 0


def test_sigterm_is_not_asked_about(terminal):
    terminal("d\n")
    job = Job(interrupted(number=signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        followed(job)
    assert job.stopped == 1


def test_second_ctrl_c_at_the_question_stops(terminal, monkeypatch):
    class Impatient(Terminal):
        def readline(self, *arguments):
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the question goes on")

    terminal("")
    monkeypatch.setattr("sys.stdin", Impatient())
    job = Job(interrupted())
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        followed(job)
    assert job.stopped == 1


def test_ctrl_c_while_the_job_is_stopping_leaves_at_once(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    job = Job(interrupted())
    job.stop_training_job = lambda **asked: job.answers.insert(0, interrupted("Stopping"))
    with pytest.raises(KeyboardInterrupt, match="is being stopped"):
        followed(job)


def test_job_that_completes_while_it_is_stopped_has_its_result(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    job = Job(interrupted(), "Completed")

    def too_late(**asked):
        raise refused("ValidationException")

    job.stop_training_job = too_late
    assert followed(job)["TrainingJobStatus"] == "Completed"


def test_handlers_are_given_back():
    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGINT) != former[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former
