"""Decides what follows a request that was not answered: another try, a failed row, or the end of the run."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0
# If an endpoint asks for a longer pause, the run ends, so that the user decides whether to wait.
MAX_RETRY_AFTER_S = 600.0

RETRIED_STATUS = frozenset({408, 409, 425, 429})


class TryAgainError(Exception):
    """The same request may be answered later: a rate limit, a server error, a lost connection or a timeout."""

    def __init__(self, cause: str, retry_after_s: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


class RowRefusedError(Exception):
    """The endpoint will never answer this request, but it may answer others. Failures are counted by `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class EndpointRefusedError(Exception):
    """The endpoint will not answer any request: the key, model, address or a setting is wrong. The message has the remedy."""


def is_retried(status: int) -> bool:
    """Whether an HTTP status says that the same request may be answered later."""
    return status in RETRIED_STATUS or status >= 500


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds to wait according to a `Retry-After` header: a number of seconds or a date (RFC 9110, section 10.2.3).

    None if the header is missing or cannot be parsed. Some endpoints send seconds with decimals, which are accepted.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        # HTTP dates are in GMT, so a date without a time zone is read as GMT.
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


_backoff = wait_random_exponential(multiplier=BACKOFF_S, max=MAX_BACKOFF_S)


def wait_s(state: RetryCallState) -> float:
    """Seconds until the next try: the `Retry-After` of the endpoint, or exponential backoff with full jitter.

    After `Retry-After` it adds up to one more second, drawn at random, so that requests with the same `Retry-After` are not
    repeated at the same moment.

    Raises:
        EndpointRefusedError: the endpoint asks for more than `MAX_RETRY_AFTER_S`.
    """
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, TryAgainError) or error.retry_after_s is None:
        return _backoff(state)
    if error.retry_after_s > MAX_RETRY_AFTER_S:
        raise EndpointRefusedError(
            f"The endpoint asks to wait {error.retry_after_s:.0f} s ({error}). Run the same command again after that time."
        )
    return error.retry_after_s + random.uniform(0, min(error.retry_after_s, 1.0))


def retrying(max_retries: int, sleep: Callable[[float], Awaitable[None]]) -> AsyncRetrying:
    """A retrier that tries once and then up to `max_retries` times; if all tries fail, it raises the last `TryAgainError`."""
    return AsyncRetrying(
        stop=stop_after_attempt(max_retries + 1),
        wait=wait_s,
        retry=retry_if_exception_type(TryAgainError),
        sleep=sleep,
        reraise=True,
    )
