"""Runs `models sign`, and kills this process at a place that the first argument names."""

import os
import signal
import sys

import zenml.model.utils

from llm_engineering.publish import signing
from tools.cli import main

place, *arguments = sys.argv[1:]


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if place == "before the signature is written":
    signing.sign = kill
else:
    zenml.model.utils.link_artifact_version_to_model_version = kill
sys.exit(main(arguments))
