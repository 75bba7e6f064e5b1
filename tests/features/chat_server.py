"""A server that speaks the chat-completions interface, on loopback, and misbehaves on request."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: What a server does with a request: the text of its answer, or a fault.
Behaviour = Callable[[dict[str, Any], int], Any]

KEY = "sk-this-key-is-secret-0123456789"


class Fault:
    """An answer that is none.

    Args:
        status: of HTTP, with this body; 0 closes the connection without a word.
        stall: seconds before anything is sent.
    """

    def __init__(self, status: int, body: str = "{}", *, stall: float = 0.0) -> None:
        self.status, self.body, self.stall = status, body, stall


class ChatServer(ThreadingHTTPServer):
    """Counts what it is asked, and how much of it at a time."""

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
        """What a client is given."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""


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
            found = server.behaviour(body, number)
            if isinstance(found, Fault):
                time.sleep(found.stall)
                if found.status == 0:
                    self.close_connection = True
                    return
                self._send(found.status, found.body)
            else:
                self._send(200, json.dumps(completion(found, body["model"])))
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
        """Nothing is printed."""


def completion(text: str, model: str) -> dict[str, Any]:
    """A chat completion with this text."""
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
    """Describes by the marked words, detects by whether one of them is in the text."""
    system, user = (message["content"] for message in body["messages"][:2])
    if "Description:" in user:
        words = set(json.loads(user.split("\n")[0].removeprefix("Description: ")).split())
        texts = [
            json.loads(line.split(". ", 1)[1])
            for line in user.split("Excerpts:\n")[1:]
            for line in line.split("\n")
        ]
        found = {str(i): bool(words & set(text.split())) for i, text in enumerate(texts, 1)}
        return json.dumps(found)
    if '"class"' in system:
        return json.dumps({"reason": "it is about sums", "class": "domain", "subclass": "math"})
    marked = re.findall("⟦(.*?)⟧", user)
    return json.dumps({"evidence": "seen", "description": " ".join(sorted(set(marked)))})


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[ChatServer]:
    """A server that is up inside the context."""
    server = ChatServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
