"""The errors with which commands end, and their exit codes."""

from __future__ import annotations

# The exit code after Ctrl-C or SIGTERM. Finished work is kept.
INTERRUPTED = 130


class RequestError(Exception):
    """The request is wrong, and nothing ran, or its data is not fit to train on. Exit code 2.

    The first sentence of the message says what is wrong and where, the second says what to do.
    """

    exit_code = 2


class WorkError(Exception):
    """The work failed after it began. Exit code 1. Finished work is kept."""

    exit_code = 1
