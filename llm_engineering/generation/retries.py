"""What happens to a request that was not answered: tried again after a while, given up, or the end of the run."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0
# An endpoint that wants a longer pause has closed for the day: that is for a person to decide.
MAX_RETRY_AFTER_S = 600.0

RETRIED_STATUS = frozenset({408, 409, 425, 429})


class TryAgainError(Exception):
    """The same request may be answered later: a rate limit, a server's error, a lost connection, no answer in time."""

    def __init__(self, cause: str, retry_after_s: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


class RowRefusedError(Exception):
    """This request will never be answered, others may be. `reason` is the name that counts group by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class EndpointRefusedError(Exception):
    """No request will be answered: a wrong key, model, address or setting. The message says what and what to do."""


def is_retried(status: int) -> bool:
    """Whether an HTTP status says that the same request may be answered later."""
    return status in RETRIED_STATUS or status >= 500


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds to wait by a `Retry-After` header, which is a number of seconds or a date (RFC 9110, section 10.2.3).

    None where there is no header or it cannot be read. Seconds may have decimals, which some endpoints send.
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
        # A date without a zone is in GMT, as all dates of HTTP are.
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


_backoff = wait_random_exponential(multiplier=BACKOFF_S, max=MAX_BACKOFF_S)


def wait_s(state: RetryCallState) -> float:
    """Seconds until the next try: what the endpoint asked for, else exponential backoff with full jitter.

    Never sooner than `Retry-After`; a little later, so that requests told the same time do not come back together.

    Raises:
        EndpointRefusedError: the endpoint asks for more than `MAX_RETRY_AFTER_S`.
    """
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, TryAgainError) or error.retry_after_s is None:
        return _backoff(state)
    if error.retry_after_s > MAX_RETRY_AFTER_S:
        raise EndpointRefusedError(
            f"The endpoint asks to wait {error.retry_after_s:.0f} s ({error}). Run again after that."
        )
    return error.retry_after_s + random.uniform(0, min(error.retry_after_s, 1.0))


def retrying(max_retries: int, sleep: Callable[[float], Awaitable[None]]) -> AsyncRetrying:
    """Tries once and then `max_retries` times; the last `TryAgainError` is raised when none is left."""
    return AsyncRetrying(
        stop=stop_after_attempt(max_retries + 1),
        wait=wait_s,
        retry=retry_if_exception_type(TryAgainError),
        sleep=sleep,
        reraise=True,
    )
