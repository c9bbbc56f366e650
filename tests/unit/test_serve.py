"""The commands that serve, and a server that ends, does not start, or is ended."""

import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, try_to_load_from_cache

from llm_engineering.errors import RequestError, WorkError
from tools.serve import check_port, link_as_cached, run_server, transformers_command, vllm_command


def test_both_servers_listen_on_loopback_alone(tmp_path):
    transformers = transformers_command("my-model", 8123, "cpu")
    assert transformers[1:] == ["serve", "my-model", "--device", "cpu", "--host", "127.0.0.1", "--port", "8123"]
    vllm = vllm_command("/bin/vllm", tmp_path, "my-model", 8123)
    assert vllm == f"/bin/vllm serve {tmp_path} --served-model-name my-model --host 127.0.0.1 --port 8123".split()


def test_the_hub_library_finds_the_model_by_its_name(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    link_as_cached(folder, "my-model", tmp_path / "cache")
    (repo,) = scan_cache_dir(tmp_path / "cache").repos
    assert (repo.repo_id, repo.repo_type) == ("my-model", "model")
    assert list(repo.refs) == ["main"]
    found = try_to_load_from_cache("my-model", "config.json", cache_dir=tmp_path / "cache", revision="main")
    assert Path(str(found)).read_text() == "{}"


def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"Port {port} cannot be used: Address already in use"):
            check_port(port)
    check_port(port)


def test_a_server_that_ends_by_itself_shows_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with pytest.raises(WorkError, match=r"exit code 3; the end of .*serve.log:\nno such model"):
        run_server(command, "http://127.0.0.1:9", "my-model", tmp_path, tmp_path / "serve.log")
