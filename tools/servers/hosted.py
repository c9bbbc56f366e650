"""The server in the container of a SageMaker endpoint: python -m tools.servers.hosted

SageMaker asks /ping until the server answers, and sends it requests for chat completions at /invocations.

| environment variable | meaning |
|---|---|
| `LLM_MODEL_NAME` | the model's name in requests |
| `LLM_TRUST_REMOTE_CODE` | `1` if the model has code of its own |
| `LLM_NEEDS_CARD` | `1` if the machine has a card, without which the server ends |
| `LLM_BIND` | address of the server. SageMaker needs the default, port 8080 on all of the container's addresses |
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch

from llm_engineering.cloud.sagemaker.endpoints import MODEL_NAME, NEEDS_CARD, TRUST_REMOTE_CODE
from llm_engineering.errors import WorkError
from llm_engineering.recipe.settings import Settings
from tools.servers.serve import run_server, transformers_behind_chat

_MODEL = Path("/opt/ml/model")


def main() -> int:
    """Serve the model until SIGTERM; returns the exit code."""
    if os.environ.get(NEEDS_CARD) == "1" and not torch.cuda.is_available():
        print(
            f"Error: this machine has a card, but torch {torch.__version__} does not find it. NVIDIA's driver may be too old for "
            f"CUDA {torch.version.cuda}. The model is not served, because it would be slow on a machine that is paid for its card.",
            file=sys.stderr,
        )
        return WorkError.exit_code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    host, _, port = os.environ.get("LLM_BIND", "0.0.0.0:8080").partition(":")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trust = os.environ.get(TRUST_REMOTE_CODE) == "1"
    with socket.socket() as listener, tempfile.TemporaryDirectory() as temporary:
        listener.bind((host, int(port)))
        scratch, name = Path(temporary), os.environ[MODEL_NAME]
        command, engine, front = transformers_behind_chat(
            _MODEL, name, listener, device, scratch, Settings(), trust_remote_code=trust
        )
        try:
            run_server(command, engine, f"{host}:{port}, model {name}", scratch, scratch / "engine.log", front)
        except KeyboardInterrupt:
            return 0
        except WorkError as error:
            print(f"Error: {error}", file=sys.stderr)
    return WorkError.exit_code


if __name__ == "__main__":
    sys.exit(main())
