"""Measures how busy the client keeps an endpoint: python -m benchmarks.endpoint [--write]

A scripted endpoint in another process answers each request after 0.3 to 0.7 s. With 32 requests in flight the ideal rate
is 32 / (mean latency) per second. The ratio is the measured rate, from the first request to the last stored answer, over
the ideal rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.machine import machine, show
from llm_engineering.generation.clients.open import open_client
from llm_engineering.generation.types import Answer, Messages, Sampling
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.generation_blocks import ClientConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

CONCURRENCY = 32
LATENCY_S = (0.3, 0.7)
REQUESTS = 1600
RESULTS = Path(__file__).with_suffix(".json")


def measure() -> dict[str, object]:
    """Send `REQUESTS` requests once; rates are in requests per second."""
    latency = [str(bound) for bound in LATENCY_S]
    command = [sys.executable, "-m", "tests.fakes.scripted_endpoint", "--faults", "0", "--latency", *latency]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            config = ClientConfig(client="openai", model="m", base_url=f"{url}/v1", concurrency=CONCURRENCY)
            client = open_client(config, ModelConfig(), ComputeConfig(), Settings(llm_output_dir=Path(folder)))
            requests: list[Messages] = [[{"role": "user", "content": f"The lamp n{i}"}] for i in range(REQUESTS)]
            sampling = Sampling(100, None, json_field="instruction")
            started = time.monotonic()
            answers = client.answer(requests, sampling, "answers")
            seconds = time.monotonic() - started
            with urllib.request.urlopen(f"{url}/counts") as response:  # noqa: S310 — loopback
                counts = json.load(response)
        finally:
            server.terminate()
    assert all(isinstance(answer, Answer) for answer in answers)
    # The latencies are uniform, so their mean is the middle. Over 1,600 requests the sample mean is within 0.01 s of it.
    ideal = CONCURRENCY / (sum(LATENCY_S) / 2)
    rate = REQUESTS / seconds
    return {
        "requests": REQUESTS,
        "concurrency": CONCURRENCY,
        "latency_s": LATENCY_S,
        "most_in_flight": counts["most"],
        "requests_per_s": round(rate, 1),
        "ideal_requests_per_s": round(ideal, 1),
        "ratio": round(rate / ideal, 3),
        "machine": machine(),
    }


def main() -> None:
    """Print the figures; `--write` also writes them beside this file."""
    parser = argparse.ArgumentParser(description="Measured rate of requests over the ideal rate.")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    show(measure(), RESULTS if arguments.write else None)


if __name__ == "__main__":
    main()
