"""Whether a role's trust policy lets a service of AWS assume the role."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llm_engineering.cloud.sagemaker.problems import POLICIES, Problem


def trust_problems(iam: Any, role: str, service: str, source: str, policies: str) -> Iterator[Problem]:
    """Check that a role exists and lets a service assume it.

    Args:
        role: the ARN of the role.
        service: the service's principal, such as `sagemaker.amazonaws.com`.
        source: the ARN of the resource for which the service assumes the role.
        policies: the role's files are `docs/aws/<policies>.json` and `docs/aws/<policies>-trust.json`.
    """
    name, trust = role.rpartition("/")[2], f"file://{POLICIES}/{policies}-trust.json"
    try:
        document = iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]
    except iam.exceptions.NoSuchEntityException:
        yield Problem(
            f"There is no role {name}",
            f"Create it with `aws iam create-role --role-name {name} --assume-role-policy-document {trust}`, and then run "
            f"`{put_policy(name, policies)}`",
        )
        return
    answer = trusts(document, service, source)
    if not answer:
        is_warning = answer is None
        yield Problem(
            f"{'Whether the role' if is_warning else 'The role'} {name} "
            + (
                f"lets {service} assume it depends on its conditions"
                if is_warning
                else f"does not let {service} assume it"
            ),
            f"Run `aws iam update-assume-role-policy --role-name {name} --policy-document {trust}`",
            is_warning,
        )


def put_policy(role: str, policy: str) -> str:
    """The command that adds a policy of docs/aws to a role."""
    return (
        f"aws iam put-role-policy --role-name {role} --policy-name llm-engineering-{policy} "
        f"--policy-document file://{POLICIES}/{policy}.json"
    )


def trusts(document: Mapping[str, Any], service: str, source: str) -> bool | None:
    """Whether a trust policy lets a service assume its role for a resource; None if it depends on unknown conditions.

    Args:
        source: the ARN of the resource. The service sends it, and the account in it, as aws:SourceArn and aws:SourceAccount.
    """
    context = {"aws:sourcearn": source, "aws:sourceaccount": source.split(":")[4]}
    found: dict[str, set[bool | None]] = {"Allow": set(), "Deny": set()}
    for statement in listed(document["Statement"]):
        principal = statement.get("Principal", {})
        # A principal that is a string is "*": everybody.
        services = listed(principal.get("Service", [])) if isinstance(principal, dict) else [service]
        actions = listed(statement.get("Action", []))
        if service in services and any(_is_like(action.lower(), "sts:assumerole") for action in actions):
            found[statement["Effect"]].add(_is_met(statement.get("Condition", {}), context))
    if True in found["Deny"] or not found["Allow"] - {False}:
        return False
    return True if True in found["Allow"] and None not in found["Deny"] else None


def _is_met(conditions: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool | None:
    """Whether all conditions of a statement are met; None if one of them cannot be evaluated here."""
    answers = {
        _compare(operator, context.get(key.lower()), [str(value) for value in listed(values)], key.lower())
        for operator, keys in conditions.items()
        for key, values in keys.items()
    }
    return False if False in answers else None if None in answers else True


def _compare(operator: str, actual: str | None, values: list[str], key: str) -> bool | None:
    base = operator.removesuffix("IfExists")
    is_negative = "Not" in base
    matches = _OPERATORS.get(base.replace("Not", ""))
    # A service sends no external id. Whether it sends other keys is not known here.
    if matches is None or (actual is None and key != "sts:externalid"):
        return None
    if actual is None:
        return is_negative or base != operator
    return any(matches(value, actual) for value in values) != is_negative


def _is_like(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern with IAM's wildcards, * and ?."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text, re.DOTALL) is not None


def _is_arn_like(pattern: str, arn: str) -> bool:
    """As `_is_like`, but no wildcard matches a colon between the first six parts of an ARN."""
    patterns, parts = pattern.split(":", 5), arn.split(":", 5)
    return len(patterns) == len(parts) and all(map(_is_like, patterns, parts))


_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": str.__eq__,
    "StringEqualsIgnoreCase": lambda value, actual: value.lower() == actual.lower(),
    "StringLike": _is_like,
    "ArnEquals": _is_arn_like,
    "ArnLike": _is_arn_like,
}


def listed(value: Any) -> list[Any]:
    """A field of an IAM policy as a list, because a policy may contain a single item in place of a list."""
    return value if isinstance(value, list) else [value]
