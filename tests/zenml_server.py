"""A ZenML server on loopback that asks for logins: python -m tests.zenml_server PORT FILE BUCKET

Its store is that of ZENML_CONFIG_PATH. FILE gets, as JSON, the API key of a service account and the id of a stack that
keeps artifacts in S3; then it serves until it is ended.
"""

import json
import os
import socket
import sys
from pathlib import Path

from tools.cli import prepare_zenml
from tools.dashboard import HOST, server_environment

port = int(sys.argv[1])
url = f"http://{HOST}:{port}"
os.environ.update(server_environment(url))
os.environ |= {"ZENML_SERVER_AUTH_SCHEME": "OAUTH2_PASSWORD_BEARER", "ZENML_SERVER_JWT_SECRET_KEY": "0" * 64}

if __name__ == "__main__":
    import uvicorn
    from zenml.client import Client
    from zenml.enums import StackComponentType
    from zenml.zen_server.zen_server_api import app

    prepare_zenml()
    client = Client()
    client.create_service_account("retraining")
    key = client.create_api_key("retraining", "default", set_key=False).key
    assert key
    stores, orchestrators = StackComponentType.ARTIFACT_STORE, StackComponentType.ORCHESTRATOR
    client.create_stack_component("s3", "s3", stores, {"path": f"s3://{sys.argv[3]}/zenml"})
    default = client.active_stack_model.components[orchestrators][0]
    stack = client.create_stack("s3", {stores: "s3", orchestrators: default.id})
    Path(sys.argv[2]).write_text(json.dumps({"key": key, "stack": str(stack.id)}))
    with socket.socket() as listener:
        listener.bind((HOST, port))
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
