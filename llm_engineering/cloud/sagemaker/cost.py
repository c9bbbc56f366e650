"""What jobs cost: prices from AWS's price list, the most that a job can cost, and what an ended job has cost."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.request import machines
from llm_engineering.recipe.compute_blocks import SageMakerConfig

logger = logging.getLogger(__name__)

# The price list of all regions is served in a few of them.
_PRICE_REGION = "us-east-1"


class Price(NamedTuple):
    """The on-demand price of a machine in US dollars an hour, and the day on which the price list gave it."""

    usd_per_hour: float
    date: str


def price_of(instance_type: str, account: Account, use: Literal["Train", "Host"] = "Train") -> Price | None:
    """The price of an instance type in the account's region; None, with a warning, if it is not known.

    Args:
        use: training, or an endpoint, which have different prices.
    """
    try:
        found = _listed(instance_type, account, use)
    except (BotoCoreError, ClientError) as error:
        logger.warning("AWS's price list cannot be read: %s", error)
        return None
    if found is None:
        purpose = "training" if use == "Train" else "an endpoint"
        logger.warning("AWS's price list has no price for %s on %s in %s", purpose, instance_type, account.region)
        return None
    return Price(found, f"{datetime.now(UTC):%Y-%m-%d}")


def _listed(instance_type: str, account: Account, use: str) -> float | None:
    """The price in the price list, see https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/price-changes.html."""
    values = {"regionCode": account.region, "instanceName": instance_type}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in values.items()]
    pages = replace(account, region=_PRICE_REGION).client("pricing").get_paginator("get_products")
    for page in pages.paginate(ServiceCode="AmazonSageMaker", Filters=filters):
        for product in map(json.loads, page["PriceList"]):
            # The same type has other prices for notebooks, endpoints and processing.
            usage = product["product"]["attributes"]["usagetype"]
            if re.fullmatch(rf"(\w+-)?{use}:{re.escape(instance_type)}", usage) is None:
                continue
            for term in product["terms"]["OnDemand"].values():
                for dimension in term["priceDimensions"].values():
                    return float(dimension["pricePerUnit"]["USD"])
    return None


def cost_sentences(config: SageMakerConfig, account: Account) -> Iterator[str]:
    """The hourly price and the upper bound of a job's cost, one sentence for each instance type."""
    if config.training_plan_arn is not None:
        yield "The machines of the jobs are paid with the training plan"
        return
    seconds = config.max_run_s + (config.keep_alive_s or 0)
    keys = "max_run_s and keep_alive_s" if config.keep_alive_s else "max_run_s"
    for kind in dict.fromkeys(machine.instance_type for machine in machines(config)):
        price = price_of(kind, account)
        if price is None:
            yield f"The cost of a job on {kind} is not known"
            continue
        hourly = price.usd_per_hour * config.instance_count
        yield (
            f"A job on {config.instance_count} x {kind} costs about {hourly:.2f} USD an hour on demand in {account.region} (price list of "
            f"{price.date}), and at most {hourly * seconds / 3600:.2f} USD (compute.sagemaker.{keys})"
        )


def cost_facts(description: dict[str, Any], price: Price | None) -> dict[str, Any]:
    """Seconds and cost of an ended job, from DescribeTrainingJob's answer.

    The on-demand price also applies to spot machines. The discount is in the time: SageMaker reports fewer billable
    seconds than training seconds. Both times are for one machine.

    Returns:
        `training_seconds`, `billable_seconds`, `spot_saving` (a share, only for spot), and with a price
        `cost_usd_estimate` and `price_date`.
    """
    resources = description["ResourceConfig"]
    trained = int(description.get("TrainingTimeInSeconds", 0))
    billed = int(description.get("BillableTimeInSeconds", 0))
    facts: dict[str, Any] = {"training_seconds": trained, "billable_seconds": billed}
    if description.get("EnableManagedSpotTraining") and trained:
        facts["spot_saving"] = round(1 - billed / trained, 3)
    if price is not None:
        facts["cost_usd_estimate"] = round(price.usd_per_hour * billed * resources["InstanceCount"] / 3600, 4)
        facts["price_date"] = price.date
    return facts


def cost_line(description: dict[str, Any], price: Price | None) -> str:
    """The facts of `cost_facts` as a sentence."""
    facts = cost_facts(description, price)
    machines = description["ResourceConfig"]
    line = (
        f"{facts['training_seconds']} s on {machines['InstanceCount']} x {machines['InstanceType']}, "
        f"{facts['billable_seconds']} s billed"
    )
    if "spot_saving" in facts:
        line += f" (spot saved {facts['spot_saving']:.0%})"
    if "cost_usd_estimate" in facts:
        return f"{line}: about {facts['cost_usd_estimate']:.2f} USD by the price list of {facts['price_date']}"
    return f"{line}; the cost is not known"
