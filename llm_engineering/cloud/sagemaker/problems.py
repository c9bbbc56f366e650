"""The problems that keep a job from running, the checks that find them, and the policies that their remedies name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.recipe.settings import Settings

# The policies with placeholders such as <ACCOUNT>.
POLICIES = Path("docs", "aws")
# Error codes of missing permissions. The answer to S3's HeadBucket has only the HTTP status.
FORBIDDEN = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403"})


class Problem(NamedTuple):
    """A reason why a job would fail. A warning means that the job may start late, or that a check could not run."""

    what: str
    remedy: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'Warning: ' if self.is_warning else ''}{self.what}. {self.remedy}."


def run_check(subject: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    """Run a check of the account and return its problems.

    If AWS forbids a request or cannot be reached, the check ends. A warning is added to the problems found before.
    """
    found: list[Problem] = []
    try:
        for problem in check():
            found.append(problem)  # noqa: PERF402 — extend would lose the problems before an error
    except ClientError as error:
        if error_code(error) in FORBIDDEN:
            reason = f"these credentials may not do {error.operation_name}"
        else:
            message = error.response["Error"].get("Message", "")
            reason = f"{error.operation_name} answered {error_code(error)}: {message}"
        remedy = f"Use the policy {POLICIES}/launcher.json, which allows every check, or check this yourself"
        found.append(Problem(f"{subject} could not be checked: {reason.rstrip(': .')}", remedy, is_warning=True))
    except BotoCoreError as error:
        reason = str(error).rstrip(".")
        found.append(Problem(f"{subject} could not be checked: {reason}", "Check the network", is_warning=True))
    return found


def error_code(error: ClientError) -> str:
    """The service's error code, or the HTTP status for a HEAD request, whose answer has no error code."""
    return str(error.response["Error"]["Code"])


def with_policies(found: Iterable[Problem], account: Account, settings: Settings, root: Path) -> list[Problem]:
    """Fill in the policies that the remedies name, and name the filled files instead.

    Args:
        root: the project's folder. The filled files are written to the folder `aws` of the output folder.
    """
    folder = settings.llm_output_dir / "aws"
    values = {
        "ACCOUNT": account.number,
        "REGION": account.region,
        "BUCKET": account.bucket,
        "SECRET": account.secret or "llm-engineering",
        "REPOSITORY": account.image_parts["repository"] if account.image_parts else "llm-engineering",
        "JOB_ROLE_ARN": account.role,
        "TOPIC_ARN": settings.notify_sns_topic,
    }

    def fill(name: re.Match[str]) -> str:
        text = (root / name[0]).read_text(encoding="utf-8").replace("arn:aws:", f"arn:{account.partition}:")
        for key, value in values.items():
            text = text.replace(f"<{key}>", value or f"<{key}>")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name[1]).write_text(text, encoding="utf-8")
        return str(folder / name[1])

    pattern = re.compile(rf"{POLICIES}/([a-z-]+\.json)")
    return [problem._replace(remedy=pattern.sub(fill, problem.remedy)) for problem in found]
