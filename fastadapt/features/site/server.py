"""Serves the pages of an export on this machine.

Requests for other files get 404: paths are matched against the names that an export writes, without
decoding or normalisation. The ``Host`` header must name this server, so that pages of other sites
cannot read the answers by DNS rebinding.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

from fastadapt.errors import RunError, UserError
from fastadapt.features.site.pages import RECORD, SITE, export, is_current
from fastadapt.features.store.store import Store
from fastadapt.io.names import has_file, typed_path

HOST = "127.0.0.1"
PORT = 8765
_FILE = re.compile(r"/(?:|index\.html|style\.css|[a-z]+\.js|data/[a-z]+(?:-[0-9]+){0,2}\.js)")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Cache-Control": "no-store",
    # index.html has the other directives, so that they also apply to pages opened as files.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_BLOCK = 1 << 20


def serve(
    source: Store | str | os.PathLike[str],
    *,
    port: int = PORT,
    ready: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> None:
    """Serve a store's pages at ``http://127.0.0.1:port/`` until Ctrl-C.

    Args:
        source: a store or a run, whose pages are exported first unless they are up to date; or the
            folder of an export, which is served without changes.
        port: TCP port; 0 for any free one.
        ready: called with the address when the server accepts requests.
        progress: called with (completed layers, total layers) of the export.
        stop: set it to end.

    Raises:
        UserError: the port is invalid or in use, or ``source`` is neither a store nor a site.
        RunError: the pages cannot be written.
    """

    def prepare() -> Path | None:
        site = None if isinstance(source, Store) else typed_path(source, "store")
        if site is not None and has_file(site / RECORD):
            return site
        store = source if isinstance(source, Store) else Store.open(source)
        folder = store.folder / SITE
        if is_current(store, folder):
            return folder
        return export(store, progress=progress, stop=stop)

    serve_folder(prepare, port=port, ready=ready, stop=stop)


def serve_folder(
    prepare: Callable[[], Path | None],
    *,
    port: int = PORT,
    ready: Callable[[str], None] | None = None,
    stop: Event | None = None,
) -> None:
    """Serve a folder of pages until Ctrl-C.

    Args:
        prepare: returns the folder, or None to end. It is called when the port is open, so that an
            invalid port fails before an export of minutes.
        port, ready, stop: see :func:`serve`.

    Raises:
        UserError: the port is invalid or in use.
    """
    server = listen(port)
    try:
        folder = prepare()
        if folder is None:
            return
        server.folder = folder.resolve()
        if stop is not None:
            Thread(target=_end_with, args=(server, stop), daemon=True).start()
        if ready is not None:
            ready(f"http://{HOST}:{server.server_port}/")
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class SiteServer(ThreadingHTTPServer):
    """HTTP server of exported pages, on the loopback interface.

    Attributes:
        folder: folder of the pages, as a path without links.
    """

    daemon_threads = True
    folder = Path()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore closed connections; report other errors."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def listen(port: int) -> SiteServer:
    """Return a server that listens on a port. Set its ``folder``, then call ``serve_forever``.

    Raises:
        UserError: the port is invalid, in use, or not permitted for this user.
        RunError: the port cannot be opened for another reason.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port: expected 0 to 65535, got {port}")
    try:
        return SiteServer((HOST, port), _Handler)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "in use" if error.errno == errno.EADDRINUSE else "not permitted for this user"
            raise UserError(
                f"port: {port} is {why}; pass another port, or 0 for any free one"
            ) from error
        raise RunError(
            f"cannot listen on {HOST}:{port}: {error.strerror}; pass another port (--port)"
        ) from error


def _end_with(server: SiteServer, stop: Event) -> None:
    stop.wait()
    server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: SiteServer
    server_version, sys_version = "fastadapt", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a request, or within one

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def _answer(self, send: bool) -> None:
        hosts = self.headers.get_all("Host", [])
        allowed = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        if len(hosts) != 1 or hosts[0].lower() not in allowed:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.send_error(HTTPStatus.BAD_REQUEST)  # a body would be parsed as the next request
            return
        try:
            path = self._file()
            file = path.open("rb") if path is not None else None
        except OSError:  # an export is replacing the file, or the name is too long
            path = file = None
        if path is None or file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            left = os.fstat(file.fileno()).st_size
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _TYPES[path.suffix])
            self.send_header("Content-Length", str(left))
            self.end_headers()
            while send and left > 0 and (block := file.read(min(left, _BLOCK))):
                self.wfile.write(block)
                left -= len(block)

    def _file(self) -> Path | None:
        # The raw request line: in self.path, parse_request merges leading slashes.
        name = self.requestline.split()[1].partition("?")[0]
        if not _FILE.fullmatch(name):
            return None
        path = self.server.folder / (name[1:] or "index.html")
        # Links are not followed: they may lead out of the folder.
        return path if path.is_file() and Path(os.path.realpath(path)) == path else None

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send one line with the status, without contents of the request, and close."""
        body = f"{int(code)} {HTTPStatus(code).phrase}\n".encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # other HTTP methods
            return lambda: self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        raise AttributeError(name)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing, instead of a line for each request."""
