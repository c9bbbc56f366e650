"""The commands of the servers, and a server that fails, is stopped, or is killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from llm_engineering.errors import RequestError, WorkError
from tests.conftest import ROOT, free_port
from tools.servers.serve import (
    bind,
    run_server,
    transformers_command,
)
from tools.servers.vllm import merged_command


def test_both_servers_listen_only_on_loopback(tmp_path):
    transformers = transformers_command("model", 8123, "cpu")
    assert transformers[1:] == ["serve", "model", "--device", "cpu", "--host", "127.0.0.1", "--port", "8123"]
    vllm = merged_command("/bin/vllm", tmp_path, "my-model", 8123, "float32")
    assert vllm[:5] == ["/bin/vllm", "serve", str(tmp_path), "--served-model-name", "my-model"]
    greedy = ["--override-generation-config", '{"temperature": 0.0}']
    assert vllm[5:] == ["--dtype", "float32", *greedy, "--host", "127.0.0.1", "--port", "8123"]


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            socket.socket() as listener,
            pytest.raises(RequestError, match=f"Port {port} cannot be used: Address already in use"),
        ):
            bind(listener, port, "serve")
    with socket.socket() as listener:
        bind(listener, port, "serve")


def test_a_server_that_fails_shows_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with pytest.raises(WorkError, match=r"exit code 3. The last lines of .*serve.log:\nno such model"):
        run_server(command, "http://127.0.0.1:9", "my-model", tmp_path, tmp_path / "serve.log")


# A server that answers. It has a child process that ignores SIGTERM, and prints the ids of both processes.
SERVER = """
import http.server, os, subprocess, sys
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
worker.stdout.readline()
print(os.getpid(), worker.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SERVE = """
import signal, sys
from pathlib import Path
from tools.servers.serve import run_server
signal.signal(signal.SIGTERM, signal.default_int_handler)
server, port, folder = sys.argv[1:]
try:
    run_server([sys.executable, "-c", server, port], f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/v1", Path(folder), Path(folder, "log"))
except KeyboardInterrupt:
    pass
"""


@pytest.fixture
def serving(tmp_path):
    """A process that runs `run_server`, and the ids of the server and of the server's child process."""
    port = str(free_port())
    # A proxy that does not exist: requests to loopback must not use it.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", SERVE, SERVER, port, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith(f"Serving: http://127.0.0.1:{port}/v1")
        server, worker = map(int, (tmp_path / "log").read_text().splitlines()[0].split())
        yield process, server, worker
    finally:
        process.kill()
        process.communicate()


def runs(process):
    try:
        # In a container, a process may stay a zombie, because no init process reaps it.
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(*processes):
    for _ in range(600):
        if not any(map(runs, processes)):
            return
        time.sleep(0.1)
    pytest.fail(f"one of {processes} still runs")


def test_no_process_is_left_after_sigterm(serving):
    process, server, worker = serving
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    wait_for_end(server, worker)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_process_ends_its_server(serving):
    process, server, worker = serving
    process.kill()
    wait_for_end(server)
    os.kill(worker, signal.SIGKILL)
