"""A hub on loopback: the HTTP interface that ``huggingface_hub`` calls to push and to download.

Repositories are lists of commits, each a mapping from names to bytes. Files of weights go through
the large-file protocol, all others through the body of a commit, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """A repository: its commits, the oldest first, and names of commits."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """The newest commit."""
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        """Files of the newest commit."""
        return self.commits[self.head]

    def add(self, files: Files) -> str:
        """Add a commit with exactly these files; return its name."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode())
        self.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a revision; None without."""
        names = {"main": self.head, **self.tags, **{commit: commit for commit in self.commits}}
        return names.get(revision)


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by name.
        users: user of each token; ``reader`` tokens may not write.
        blobs: large files by SHA-256.
        fault: called with method and path of each request; "drop" closes the connection, a number
            is the status of the answer.
        requests: method and path of each request.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.users = {"hf_ann": "ann", "hf_bob": "bob"}
        self.blobs: dict[str, bytes] = {}
        self.fault: Callable[[str, str], str | int | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        """Address of the hub."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, name: str, files: Files = {}, *, private: bool = False) -> Repository:  # noqa: B006
        """Add a repository with one commit."""
        self.repositories[name] = repository = Repository(private)
        repository.add({".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return repository

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for a connection that was dropped."""


class _Answer:
    """Status, body and headers of an answer."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class _RefusedError(Exception):
    """A request that the hub does not carry out."""

    def __init__(self, answer: _Answer) -> None:
        self.answer = answer


def _error(status: int, code: str, message: str) -> _Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return _Answer(status, {"error": message}, **headers)


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def do_PUT(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.server.requests.append((self.command, path))
        fault = self.server.fault(self.command, path)
        if fault == "drop":
            self.close_connection = True
            return
        try:
            if isinstance(fault, int):
                answer = _error(fault, "", "as the test wants")
            else:
                answer = self._route(path.strip("/").split("/"), body)
        except _RefusedError as refused:
            answer = refused.answer
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _route(self, parts: list[str], body: bytes) -> _Answer:
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"])
            case "GET", ["api", "models", owner, name]:
                return self._info(f"{owner}/{name}", "main")
            case "GET", ["api", "models", owner, name, "revision", *revision]:
                return self._info(f"{owner}/{name}", "/".join(revision))
            case "GET", ["api", "models", owner, name, "tree", revision]:
                return self._tree(f"{owner}/{name}", revision)
            case "POST", ["api", "models", owner, name, "preupload", "main"]:
                return self._preupload(f"{owner}/{name}", json.loads(body))
            case "POST", ["api", "models", owner, name, "commit", "main"]:
                return self._commit(f"{owner}/{name}", body)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case "PUT", ["blobs", digest]:
                return self._store(digest, body)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                return self._file(f"{owner}/{name}", revision, "/".join(path))
        return _error(404, "NotFound", f"no such address: {self.path}")

    # --- access ---

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise _RefusedError(_error(401, "", "Invalid credentials in Authorization header"))
        return self.server.users.get(token)

    def _readable(self, name: str, revision: str) -> tuple[Repository, str]:
        repository, user = self.server.repositories.get(name), self._user()
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise _RefusedError(
                _error(401 if user is None else 404, "RepoNotFound", "Repository not found")
            )
        if (commit := repository.resolve(revision)) is None:
            raise _RefusedError(_error(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
        return repository, commit

    def _writable(self, name: str) -> Repository:
        repository, _ = self._readable(name, "main")
        if self._user() != name.split("/")[0]:
            raise _RefusedError(
                _error(401 if self._user() is None else 403, "", "You may not write here")
            )
        return repository

    # --- reading ---

    def _info(self, name: str, revision: str) -> _Answer:
        repository, commit = self._readable(name, revision)
        siblings = [{"rfilename": file} for file in repository.commits[commit]]
        return _Answer(
            200,
            {"id": name, "sha": commit, "private": repository.private, "siblings": siblings},
        )

    def _tree(self, name: str, revision: str) -> _Answer:
        repository, commit = self._readable(name, revision)
        entries: list[dict[str, Any]] = []
        for path, content in repository.commits[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = _git_sha(content)
            if _is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return _Answer(200, entries)

    def _file(self, name: str, revision: str, path: str) -> _Answer:
        repository, commit = self._readable(name, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise _RefusedError(_error(404, "EntryNotFound", f"no file {path}"))
        large = _is_large(path)
        etag = hashlib.sha256(content).hexdigest() if large else _git_sha(content)
        return _Answer(200, content, **{"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    # --- writing ---

    def _create(self, request: dict[str, Any]) -> _Answer:
        user, name = self._user(), f"{request['organization']}/{request['name']}"
        if user is None:
            return _error(401, "", "Invalid username or password.")
        if user != request["organization"]:
            return _error(403, "", "You may not create a repository there")
        if name in self.server.repositories:
            return _error(409, "", "You already created this repository")
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.server.create(name, private=private)
        return _Answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _validate(self, content: str) -> _Answer:
        header = yaml.safe_load(content.split("---\n")[1])
        fine = isinstance(header, dict) and bool(header.get("tags"))
        errors = [] if fine else [{"message": "no metadata"}]
        return _Answer(200 if fine else 400, {"errors": errors, "warnings": []})

    def _preupload(self, name: str, request: dict[str, Any]) -> _Answer:
        present = self._writable(name).files
        modes = []
        for file in request["files"]:
            path = file["path"]
            mode = {"path": path, "uploadMode": "lfs" if _is_large(path) else "regular"}
            entry: dict[str, Any] = {**mode, "shouldIgnore": False}
            if path in present:
                digest = hashlib.sha256(present[path]).hexdigest()
                entry["oid"] = digest if _is_large(path) else _git_sha(present[path])
            modes.append(entry)
        return _Answer(200, {"files": modes})

    def _batch(self, name: str, request: dict[str, Any]) -> _Answer:
        self._writable(name)
        objects = []
        for wanted in request["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.server.blobs:
                href = f"{self.server.url}/blobs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, digest: str, body: bytes) -> _Answer:
        if hashlib.sha256(body).hexdigest() != digest:
            return _error(400, "", "the bytes are not those of the digest")
        self.server.blobs[digest] = body
        return _Answer(200)

    def _commit(self, name: str, body: bytes) -> _Answer:
        repository = self._writable(name)
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert item["key"] == "header", item
        commit = repository.add(files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        return _Answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Run a hub inside the context."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
