"""What stands in the way of a job, each with its remedy; and checks that may themselves be forbidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

# How services say that the credentials do not suffice; S3 and HEAD requests have no more than the status.
FORBIDDEN = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403"})


class Problem(NamedTuple):
    """Something that would make a job fail, or, as a warning, could not be looked at or may slow it down."""

    what: str
    remedy: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'Warning: ' if self.is_warning else ''}{self.what}. {self.remedy}."


def tried(subject: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    """A check's problems; a warning where AWS does not let it look, or cannot be asked."""
    found: list[Problem] = []
    try:
        # One by one, so that what was found before an error stays.
        for problem in check():
            found += [problem]
    except ClientError as error:
        code = error_code(error)
        if code in FORBIDDEN:
            why = f"these credentials may not do {error.operation_name}"
        else:
            why = f"{error.operation_name} answered {code}: {error.response['Error'].get('Message', '')}".rstrip(": .")
        found.append(Problem(f"{subject} could not be checked: {why}", _GRANT, is_warning=True))
    except BotoCoreError as error:
        why = str(error).rstrip(".")
        found.append(Problem(f"{subject} could not be checked: {why}", "Check the network", is_warning=True))
    return found


_GRANT = "docs/aws/launcher.json is the policy that allows every check; without it, make sure of this yourself"


def error_code(error: ClientError) -> str:
    """The service's own code; of a HEAD request, which has none, the HTTP status."""
    return str(error.response["Error"]["Code"])
