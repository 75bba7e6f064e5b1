"""Chat-completions server on loopback, with faults on request."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Reply of the server to (body, number of the request): text of the answer, or a fault.
Behaviour = Callable[[dict[str, Any], int], Any]

KEY = "sk-this-key-is-secret-0123456789"


class Fault:
    """Reply without an answer.

    Args:
        status: HTTP status; 0 closes the connection without a response.
        body: body of the response.
        stall: seconds before the response.
    """

    def __init__(self, status: int, body: str = "{}", *, stall: float = 0.0) -> None:
        self.status, self.body, self.stall = status, body, stall


class ChatServer(ThreadingHTTPServer):
    """Records requests, and the maximum number of concurrent ones."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.append(self.headers.get("Authorization"))
            number = len(server.requests)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.behaviour(body, number)
            if isinstance(reply, Fault):
                time.sleep(reply.stall)
                if reply.status == 0:
                    self.close_connection = True
                    return
                self._send(reply.status, reply.body)
            else:
                self._send(200, json.dumps(completion(reply, body["model"])))
        finally:
            with server.lock:
                server.at_once -= 1

    def _send(self, status: int, body: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def completion(text: str, model: str) -> dict[str, Any]:
    """Return a chat completion with a text."""
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }


def answers_well(body: dict[str, Any], _: int = 0) -> str:
    """Describe by the marked words; detect by whether a text contains one of them."""
    system, user = (message["content"] for message in body["messages"][:2])
    if "Description:" in user:
        words = set(json.loads(user.split("\n")[0].removeprefix("Description: ")).split())
        texts = [
            json.loads(line.split(". ", 1)[1])
            for line in user.split("Excerpts:\n")[1:]
            for line in line.split("\n")
        ]
        answers = {str(i): bool(words & set(text.split())) for i, text in enumerate(texts, 1)}
        return json.dumps(answers)
    if '"class"' in system:
        return json.dumps({"reason": "it is about sums", "class": "domain", "subclass": "math"})
    marked = re.findall("⟦(.*?)⟧", user)
    return json.dumps({"evidence": "seen", "description": " ".join(sorted(set(marked)))})


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[ChatServer]:
    """Run a server inside the context."""
    server = ChatServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
