"""The ways a command ends without success, and the exit code of each."""

from __future__ import annotations

# Ctrl-C, SIGTERM: what was finished is kept.
INTERRUPTED = 130


class RequestError(Exception):
    """The request was wrong: nothing ran, exit code 2.

    The message is one sentence that says what is wrong and where, and a second that says what to do.
    """

    exit_code = 2


class WorkError(Exception):
    """The work failed after it began: exit code 1. What was finished before is kept."""

    exit_code = 1
