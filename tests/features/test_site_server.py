"""The server sends the site's files, and nothing else, to this machine only."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from browser import serving
from stores import StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.features.site import export, serve
from fastadapt.features.store.store import Store

SECRET = "nothing that anyone should read"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rng = np.random.default_rng(0)
    texts = [StoreText(list(rng.integers(0, 9, 20)), [2] * 5 + [5] * 15, "math")]
    activations = [np.maximum(rng.normal(size=(1, 20, 3)), 0).astype(np.float32)]
    (tmp_path / "secret.js").write_text(SECRET)
    return make_store(tmp_path / "features", texts, activations, list("abcdefghi")).store


@pytest.fixture
def port(store: Store) -> Iterator[int]:
    """Return the port of a server of the store's pages."""
    with serving(store) as address:
        yield int(address.rsplit(":", 1)[1].strip("/"))


def send(port: int, request: bytes) -> tuple[int, bytes]:
    """Send raw bytes; return the status and the complete answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while block := connection.recv(1 << 16):
            answer += block
    status = answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/") else b"0"
    return int(status), answer


def get(port: int, target: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    host = f"127.0.0.1:{port}" if host is None else host
    return send(
        port, f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/index.html", "text/html; charset=utf-8"),
        ("/router.js", "text/javascript; charset=utf-8"),
        ("/router.js?v=1", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/data/adapter-0-0.js", "text/javascript; charset=utf-8"),
    ],
)
def test_the_files_of_the_site_are_served(port: int, store: Store, target: str, kind: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    name = target.split("?")[0].lstrip("/") or "index.html"
    held = (store.folder / "site" / name).read_bytes()
    for method, body in (("GET", held), ("HEAD", b""), ("GET", held)):  # on one connection
        connection.request(method, target)
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.read() == body
        assert answer.headers["Content-Length"] == str(len(held))
        assert answer.headers["Content-Type"] == kind
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    connection.close()


HOSTILE = [
    "/../secret.js",
    "/data/../../../secret.js",
    "/data/../../manifest.json",
    "/..%2fsecret.js",
    "/%2e%2e/%2e%2e/secret.js",
    "/%2e%2e%2fmanifest.json",
    "/data/%2e%2e/router.js",
    "/..\\..\\secret.js",
    "/data\\..\\..\\secret.js",
    "//etc/passwd",
    "//router.js",
    "///router.js",
    "/./router.js",
    "/data//adapter-0.js",
    "/etc/passwd",
    "/data/",
    "/data",
    "/site.json",
    "/manifest.json",
    "/router.js%00.html",
    "/router.js\x00",
    "/router.js/",
    "/router.js/..",
    "/router.js;/../secret.js",
    "/data/link.js",
    "/data/folder-0.js",
    "/outside.js",
    "/.tmp-site",
    "http://127.0.0.1/router.js",
    "file:///etc/passwd",
    "router.js",
    "*",
    "/ａpp.js",
    "/" + "a" * 70_000,
    "/" + "a" * 5_000 + ".js",
    "/data/" + "a" * 5_000 + "-1.js",
    "/data/adapter-0.js/../../../secret.js",
]


def test_hostile_requests_get_nothing(
    port: int, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = store.folder / "site"
    (site / "data" / "link.js").symlink_to(tmp_path / "secret.js")
    (site / "outside.js").symlink_to(tmp_path / "secret.js")
    (site / "data" / "folder-0.js").mkdir()
    assert len(HOSTILE) >= 30
    for target in HOSTILE:
        status, answer = get(port, target)
        assert status in (400, 404, 414), target[:60]
        body = answer.partition(b"\r\n\r\n")[2]
        assert body.startswith(b"4"), target[:60]
        assert len(body) < 60, target[:60]
        assert SECRET.encode() not in answer
    # A folder of the site that is a link out of it.
    (site / "data").rename(tmp_path / "moved")
    (site / "data").symlink_to(tmp_path / "moved")
    assert get(port, "/data/adapter-0.js")[0] == 404
    assert get(port, "/router.js")[0] == 200
    assert capsys.readouterr().err == ""  # no traceback of a thread


def test_other_host_headers_are_refused(port: int) -> None:
    names = ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "")
    for host in (*names, f"0.0.0.0:{port}", f"127.0.0.1:{port}.evil.example"):
        assert get(port, "/", host=host)[0] == 421, host


def test_malformed_requests_and_other_methods_are_refused(port: int) -> None:
    here = f"Host: 127.0.0.1:{port}\r\n"
    assert get(port, "/", host=f"localhost:{port}")[0] == 200
    assert send(port, b"GET / HTTP/1.1\r\n\r\n")[0] == 421
    assert send(port, f"GET / HTTP/1.1\r\n{here}{here}\r\n".encode())[0] == 421
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "BREW"):
        status, answer = get(port, "/", method=method)
        assert status == 405, method
        assert b"Allow: GET, HEAD" in answer
    second = f"GET /router.js HTTP/1.1\r\n{here}\r\n"
    smuggled = f"GET / HTTP/1.1\r\n{here}Content-Length: {len(second)}\r\n\r\n{second}"
    status, answer = send(port, smuggled.encode())
    assert status == 400
    assert answer.count(b"HTTP/1.1") == 1
    chunked = f"GET / HTTP/1.1\r\n{here}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert send(port, chunked.encode())[0] == 400
    assert get(port, "/")[0] == 200


def test_it_listens_on_this_machine_only(port: int) -> None:
    listening = Path("/proc/net/tcp")
    if not listening.is_file():
        pytest.skip("needs /proc/net/tcp")
    local = {line.split()[1] for line in listening.read_text().splitlines()[1:]}
    assert [entry for entry in local if entry.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_ports_in_use_and_invalid_ports_are_refused(store: Store, port: int) -> None:
    with pytest.raises(UserError, match=f"port: {port} is in use; pass another port, or 0"):
        serve(store, port=port)
    with pytest.raises(UserError, match="port: expected 0 to 65535, got 65536"):
        serve(store, port=65536)


def test_a_folder_without_store_and_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no features yet"):
        serve(tmp_path, port=0)


def serve_once(source: object) -> None:
    """Serve until the server is ready, then stop."""
    stop = Event()
    serve(source, port=0, ready=lambda _: stop.set(), stop=stop)  # type: ignore[arg-type]


def test_missing_and_outdated_pages_are_exported(store: Store) -> None:
    record = store.folder / "site" / "site.json"
    serve_once(store.folder)
    first = record.stat().st_mtime_ns
    serve_once(store)
    assert record.stat().st_mtime_ns == first
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("runs/made", "runs/other"))
    serve_once(store)
    assert record.stat().st_mtime_ns > first


def test_an_export_is_served_without_its_store(store: Store, tmp_path: Path) -> None:
    site = export(store, tmp_path / "pages")
    assert site is not None
    store.folder.rename(tmp_path / "gone")
    with serving(site) as address:
        status, answer = get(int(address.rsplit(":", 1)[1].strip("/")), "/index.html")
    assert status == 200
    assert answer.endswith((site / "index.html").read_bytes())


@pytest.mark.slow
def test_ctrl_c_ends_it_quietly(store: Store) -> None:
    code = (  # processes that a shell starts in the background ignore SIGINT by default
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from fastadapt.features.site import serve; "
        "serve(sys.argv[1], port=0, ready=lambda a: print(a, flush=True)); print('ended')"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    time.sleep(0.2)
    process.send_signal(2)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (0, "ended\n", "")
