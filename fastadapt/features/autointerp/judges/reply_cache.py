"""Cache of an endpoint's replies on disk, keyed by the content of the request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastadapt.io.atomic import disk_errors, make_folder, replacing
from fastadapt.io.documents import DocumentError, read_json
from fastadapt.io.names import inside


class _Record(TypedDict):
    request: dict[str, Any]
    answer: str


class ReplyCache:
    """Folder of replies, one file each, named after the hash of its request.

    A file holds the request and the reply, without the endpoint's key and the secret parts of its
    address. Writes are atomic; an unreadable file counts as missing.

    Args:
        folder: created with the first reply.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, request: Mapping[str, Any]) -> str | None:
        """Return the cached reply to a request; None if the cache has none."""
        try:
            record = read_json(self._path(request), _Record)
        except DocumentError:
            return None
        answer: str = record["answer"]
        return answer if record["request"] == request and _is_text(answer) else None

    def put(
        self, request: Mapping[str, Any], answer: str, usage: Mapping[str, Any] | None = None
    ) -> None:
        """Write the reply to a request, and the token counts that the endpoint reports.

        Raises:
            RunError: the folder cannot be written.
        """
        path = self._path(request)
        record = {"request": request, "answer": answer, "usage": usage}
        with disk_errors(path):
            make_folder(path.parent)
            with replacing(path) as staged:
                staged.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    def remove(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Delete the replies to the requests given."""
        for request in requests:
            self._path(request).unlink(missing_ok=True)

    def _path(self, request: Mapping[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        name = hashlib.sha256(text.encode()).hexdigest()
        return inside(self.folder, name[:2], f"{name}.json", source="cached replies")


def _is_text(answer: str) -> bool:
    try:
        answer.encode()
    except UnicodeEncodeError:  # a lone surrogate, which put() never receives
        return False
    return True
