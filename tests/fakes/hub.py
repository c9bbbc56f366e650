"""A small Hugging Face Hub on loopback: accounts, repositories, commits with LFS, and downloads, over real HTTP."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class Repo:
    """A repository: its newest files, and the paths that each commit wrote and removed."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, list[str]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeHub:
    """The hub's state. `failures` maps the end of a path to the status and message of its answer."""

    token: str
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)

    def sent(self, method: str, path: str) -> list[Any]:
        """The JSON bodies of requests to a path."""
        return [json.loads(r.body) for r in self.requests if (r.method, urlparse(r.path).path) == (method, path)]


@contextmanager
def running_hub(token: str) -> Iterator[FakeHub]:
    """Serve a hub that accepts one token, until the block ends."""
    hub = FakeHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.body = self._read_body()
        self.hub.requests.append(Request(self.command, self.path, dict(self.headers), self.body))
        url = urlparse(self.path)
        self.where, self.query = unquote(url.path), parse_qs(url.query)
        failure = next((f for end, f in self.hub.failures.items() if self.where.endswith(end)), None)
        if failure:
            self._error(*failure)
            return
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, self.where)
            if match and self.command in method:
                answer(self, *match.groups())
                return
        self._error(404, "Not found", code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _bytes(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self._json({"error": message, "errors": [{"message": message}]}, status, **headers)

    def _repo(self, name: str) -> Repo | None:
        """A repository that the caller may see. Otherwise the answer is the real hub's, which does not give the reason."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._allowed):
            self._error(404 if self._allowed else 401, "Repository not found", code="RepoNotFound")
            return None
        return repo

    def whoami(self) -> None:
        if self._allowed:
            self._json({"type": "user", "name": "someone", "auth": {"accessToken": {"role": "write"}}})
        else:
            self._error(401, "Invalid credentials in Authorization header")

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._allowed:
            self._error(401, "Invalid credentials in Authorization header")
        elif name in self.hub.repos:
            self._error(409, "You already created this repo")
        else:
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
            self._json({"url": f"{self.hub.url}/datasets/{name}", "name": name})

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str) -> None:
        if self._repo(name):
            modes = [
                {"path": f["path"], "uploadMode": "regular" if f["path"].endswith(".md") else "lfs",
                 "shouldIgnore": False} for f in json.loads(self.body)["files"]
            ]  # fmt: skip
            self._json({"files": modes})

    def lfs_batch(self, name: str) -> None:
        if self._repo(name):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self._bytes(b"")

    def commit(self, name: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        written, removed = {}, []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                written[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                removed.append(value["path"])
        for path in removed:
            del repo.files[path]
        repo.files |= written
        repo.commits.append({"written": sorted(written), "removed": removed})
        self._json({"success": True, "commitOid": repo.sha, "commitUrl": f"{self.hub.url}/datasets/{name}/commit/1"})

    def info(self, name: str) -> None:
        if repo := self._repo(name):
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            self._json({"_id": name, "id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, below: str | None) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        folder = f"{below.strip('/')}/" if below else ""
        is_recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        found: dict[str, Any] = {}
        for path, content in sorted(repo.files.items()):
            if path.startswith(folder):
                parts = path.removeprefix(folder).split("/")
                for depth in range(1, len(parts)):
                    inner = folder + "/".join(parts[:depth])
                    found.setdefault(inner, {"type": "directory", "path": inner, "oid": "0" * 40, "size": 0})
                found[path] = _entry(path, content)
        shown = [e for e in found.values() if is_recursive or "/" not in e["path"].removeprefix(folder)]
        self._json(shown)

    def paths_info(self, name: str) -> None:
        if repo := self._repo(name):
            asked = json.loads(self.body)["paths"]
            self._json([_entry(path, repo.files[path]) for path in asked if path in repo.files])

    def resolve(self, name: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if path not in repo.files:
            self._error(404, "Entry not found", code="EntryNotFound")
            return
        content = repo.files[path]
        self._bytes(content, X_Repo_Commit=repo.sha, ETag=f'"{hashlib.sha256(content).hexdigest()}"')


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha256(content).hexdigest()[:40]}


_REPO = r"([^/]+/[^/]+)"
_API = rf"/api/(?:datasets|models)/{_REPO}"
_FILES = rf"(?:/datasets)?/{_REPO}"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"{_API}/preupload/main", _Handler.preupload),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", rf"{_API}/commit/main", _Handler.commit),
    ("GET", rf"{_API}(?:/revision/[^/]+)?", _Handler.info),
    ("GET", rf"{_API}/tree/[^/]+(/.*)?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/[^/]+", _Handler.paths_info),
    ("GET HEAD", rf"{_FILES}/resolve/[^/]+/(.+)", _Handler.resolve),
]
