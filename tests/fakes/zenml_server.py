"""A ZenML server on loopback that requires logins: python -m tests.fakes.zenml_server PORT FILE

Its store is the one of ZENML_CONFIG_PATH. It writes the API key of a service account to FILE, and serves until it is killed.
"""

import os
import socket
import sys
from pathlib import Path

from tools.servers.serve import HOST, server_environment

port = int(sys.argv[1])
url = f"http://{HOST}:{port}"
os.environ.update(server_environment(url))
os.environ |= {"ZENML_SERVER_AUTH_SCHEME": "OAUTH2_PASSWORD_BEARER", "ZENML_SERVER_JWT_SECRET_KEY": "0" * 64}

if __name__ == "__main__":
    import uvicorn
    from zenml.client import Client
    from zenml.zen_server.zen_server_api import app

    client = Client()
    client.create_service_account("retraining")
    key = client.create_api_key("retraining", "default", set_key=False).key
    assert key
    Path(sys.argv[2]).write_text(key)
    with socket.socket() as listener:
        listener.bind((HOST, port))
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
