"""Following a job: new lines of its log, lost connections, and the meaning of Ctrl-C."""

import io
import logging
import os
import signal
from datetime import UTC, datetime, timedelta

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, UnauthorizedSSOTokenError

from llm_engineering.cloud.sagemaker import jobs
from llm_engineering.cloud.sagemaker.jobs import JobLog, Signals, follow


def refused(code, status=400):
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "operation")


class Logs:
    """CloudWatch's answers: a page has at most two events, and at the end of a stream the token stays the same."""

    def __init__(self):
        self.streams = None
        # Called for each page, one after another; a function may raise.
        self.refused_pages = []

    def get_paginator(self, operation):
        assert operation == "describe_log_streams"
        return self

    def paginate(self, **asked):
        if self.streams is None:
            raise refused("ResourceNotFoundException")
        names = [name for name in self.streams if name.startswith(asked["logStreamNamePrefix"])]
        yield from ({"logStreams": [{"logStreamName": name}]} for name in names)

    def get_log_events(self, **asked):
        if self.refused_pages:
            self.refused_pages.pop(0)()
        stream = self.streams[asked["logStreamName"]]
        if asked["startFromHead"]:
            start = int(asked.get("nextToken", "0"))
            lines = stream[start : start + 2]
        else:
            assert "nextToken" not in asked
            start = max(0, len(stream) - asked["limit"])
            lines = stream[start:]
        return {"events": [{"message": line} for line in lines], "nextForwardToken": str(start + len(lines))}


def test_each_read_returns_the_new_lines():
    logs = Logs()
    log = JobLog(logs, "a-job")
    assert log.read() == []
    logs.streams = {"a-job/algo-1-17": ["1", "2", "3", "4", "5 \n"], "a-job-2/algo-1-17": ["of another job"]}
    assert log.read() == ["1", "2", "3", "4", "5"]
    assert log.read() == []
    logs.streams["a-job/algo-1-17"].append("6")
    assert log.read() == ["6"]
    # After an interruption the job writes to a new stream.
    logs.streams["a-job/algo-1-99"] = ["7"]
    assert log.read() == ["7"]


def throttle():
    raise refused("ThrottlingException")


def test_no_line_is_lost_if_a_later_page_is_throttled():
    logs = Logs()
    logs.streams = {"j/algo-1-17": ["1", "2", "3", "4", "5"], "j/algo-2-17": ["x"]}
    log = JobLog(logs, "j")
    logs.refused_pages = [lambda: None, lambda: None, throttle]
    with pytest.raises(ClientError):
        log.read()
    assert log.read() == ["algo-1: 1", "algo-1: 2", "algo-1: 3", "algo-1: 4", "algo-1: 5", "algo-2: x"]
    assert log.read() == []


def test_a_job_that_was_found_shows_the_end_of_its_log_and_then_every_line():
    logs = Logs()
    logs.streams = {"j/algo-1-17": [str(number) for number in range(200)]}
    log = JobLog(logs, "j", from_end=True)
    assert log.read() == [str(number) for number in range(150, 200)]
    logs.streams["j/algo-1-17"] += ["a", "b", "c"]
    # The stream of a restarted job is new, so it is shown from its beginning.
    logs.streams["j/algo-1-99"] = [str(number) for number in range(60)]
    assert log.read() == ["a", "b", "c", *map(str, range(60))]


def test_lines_of_several_machines_have_names_and_the_last_lines_are_kept():
    logs = Logs()
    logs.streams = {"j/algo-1-17": [str(number) for number in range(60)], "j/algo-2-17": ["x"]}
    log = JobLog(logs, "j")
    assert log.read()[-2:] == ["algo-1: 59", "algo-2: x"]
    assert len(log.last) == 50
    assert log.last[-1] == "algo-2: x"


class Job:
    """Answers DescribeTrainingJob with the given statuses, one after another; an exception is raised."""

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
def short_waits(monkeypatch):
    monkeypatch.setattr(jobs, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(jobs, "_LAST_LINES_S", 0.01)


def followed(job):
    with Signals() as signals:
        return follow(job, JobLog(Logs(), "a-job"), "a-job", signals)


def test_following_waits_while_the_connection_is_lost_or_aws_is_busy(caplog):
    lost = EndpointConnectionError(endpoint_url="https://sagemaker")
    throttled = map(refused, ["ThrottlingException", "RequestThrottledException", "TooManyRequestsException"])
    slow = (refused("RequestTimeout"), refused("SomethingNew", 429))
    job = Job("InProgress", lost, lost, refused("ServiceUnavailable", 503), *throttled, *slow, "Completed")
    assert followed(job)["TrainingJobStatus"] == "Completed"
    assert caplog.text.count("AWS cannot be reached") == 1


class Waiting(Job):
    """A job with a list of states in each answer: pairs of a state and its message; each state began `ago` seconds ago."""

    def __init__(self, *answers, ago=0.0):
        super().__init__(*answers)
        self.began = datetime.now(UTC) - timedelta(seconds=ago)

    def describe_training_job(self, **asked):
        states = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        status = states[-1][0]
        return {
            "TrainingJobName": asked["TrainingJobName"],
            "TrainingJobStatus": status if status == "Completed" else "InProgress",
            "SecondaryStatusTransitions": [
                {"Status": state, "StatusMessage": message, "StartTime": self.began} for state, message in states
            ],
        }


def test_a_changed_message_of_a_state_is_shown_and_an_unchanged_one_only_once(caplog):
    caplog.set_level(logging.INFO)
    preparing = ("Starting", "Preparing the instances")
    retrying = ("Starting", "Insufficient capacity error from EC2, retrying!")
    followed(Waiting([preparing], [preparing], [retrying], [retrying], [retrying, ("Completed", "Done")]))
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "Starting. Preparing the instances",
        "Starting. Insufficient capacity error from EC2, retrying!",
        "Completed. Done",
    ]


@pytest.mark.parametrize(
    ("states", "waits"),
    [
        ([("Starting", "")], True),
        ([("Starting", ""), ("Training", ""), ("Interrupted", ""), ("Starting", "")], True),
        ([("Starting", ""), ("Downloading", "")], False),
        ([("Starting", ""), ("Training", "")], False),
    ],
)
def test_only_a_job_without_its_machines_waits(states, waits):
    description = Waiting(states, ago=100.0).describe_training_job(TrainingJobName="j")
    assert (jobs.pending_s(description) > 99) == waits


def test_following_ends_with_a_job_that_waits_too_long_only_if_there_is_a_bound():
    def job():
        return Waiting([("Starting", "")], [("Starting", "")], [("Completed", "")], ago=100.0)

    with Signals() as signals:
        assert follow(job(), JobLog(Logs(), "j"), "j", signals, 90)["TrainingJobStatus"] == "InProgress"
        assert follow(job(), JobLog(Logs(), "j"), "j", signals, 110)["TrainingJobStatus"] == "Completed"
        assert follow(job(), JobLog(Logs(), "j"), "j", signals)["TrainingJobStatus"] == "Completed"


def test_following_ends_when_aws_refuses():
    with pytest.raises(ClientError):
        followed(Job("InProgress", refused("ExpiredToken")))
    with pytest.raises(UnauthorizedSSOTokenError):
        followed(Job("InProgress", UnauthorizedSSOTokenError()))


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
def test_a_signal_without_a_terminal_stops_the_job(number, monkeypatch):
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


def test_sigterm_stops_without_a_question(terminal):
    terminal("d\n")
    job = Job(interrupted(number=signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        followed(job)
    assert job.stopped == 1


def test_a_second_ctrl_c_at_the_question_stops(terminal, monkeypatch):
    class Impatient(Terminal):
        def readline(self, *arguments):
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the question was not interrupted")

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


def test_a_job_that_completes_while_it_is_stopped_is_completed(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    job = Job(interrupted(), "Completed")

    def too_late(**asked):
        raise refused("ValidationException")

    job.stop_training_job = too_late
    assert followed(job)["TrainingJobStatus"] == "Completed"


def test_signal_handlers_are_restored():
    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGINT) != former[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former
