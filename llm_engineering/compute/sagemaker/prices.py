"""What a job costs, by a small table: an estimate, for Amazon's bill is the only price that holds."""

from __future__ import annotations

from typing import Any

PRICED_IN = "us-east-1, 2025-06"
# On-demand list prices of SageMaker training in US dollars an hour, for the region and month above. They change, and
# differ by region: https://aws.amazon.com/sagemaker/ai/pricing/
USD_PER_HOUR = {
    "ml.m5.large": 0.115,
    "ml.m5.xlarge": 0.23,
    "ml.g4dn.xlarge": 0.7364,
    "ml.g4dn.2xlarge": 0.94,
    "ml.g4dn.12xlarge": 4.89,
    "ml.g5.xlarge": 1.408,
    "ml.g5.2xlarge": 1.515,
    "ml.g5.4xlarge": 2.03,
    "ml.g5.12xlarge": 7.09,
    "ml.g5.48xlarge": 20.36,
    "ml.g6.xlarge": 1.1267,
    "ml.g6.2xlarge": 1.222,
    "ml.p3.2xlarge": 3.825,
}


def cost_facts(description: dict[str, Any]) -> dict[str, Any]:
    """Seconds and cost of an ended job, from what DescribeTrainingJob says of it.

    Spot needs no price of its own: SageMaker counts fewer billable seconds, and the saving is what is missing. Both
    times are those of one machine.

    Returns:
        `training_seconds`, `billable_seconds`, `spot_saving` (a share, spot only), and `cost_usd_estimate`, which is
        missing for a type without a known price.
    """
    resources = description["ResourceConfig"]
    trained = int(description.get("TrainingTimeInSeconds", 0))
    billed = int(description.get("BillableTimeInSeconds", 0))
    facts: dict[str, Any] = {"training_seconds": trained, "billable_seconds": billed}
    if description.get("EnableManagedSpotTraining") and trained:
        facts["spot_saving"] = round(1 - billed / trained, 3)
    price = USD_PER_HOUR.get(resources["InstanceType"])
    if price is not None:
        facts["cost_usd_estimate"] = round(price * billed * resources["InstanceCount"] / 3600, 4)
    return facts


def cost_line(description: dict[str, Any]) -> str:
    """The same as a sentence."""
    facts = cost_facts(description)
    machines = description["ResourceConfig"]
    line = (
        f"{facts['training_seconds']} s on {machines['InstanceCount']} x {machines['InstanceType']}, "
        f"{facts['billable_seconds']} s billed"
    )
    if "spot_saving" in facts:
        line += f" (spot saved {facts['spot_saving']:.0%})"
    if "cost_usd_estimate" in facts:
        return f"{line}: about {facts['cost_usd_estimate']:.2f} USD at the list price of {PRICED_IN}"
    return f"{line}; no estimate of the cost, for no price of this type is known here"
